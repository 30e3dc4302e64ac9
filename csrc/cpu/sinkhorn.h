// One dense problem: gather the rows and columns that exist, solve, scatter.
#pragma once
#include "problem.h"

namespace {

template <class T> size_t sinkhorn_scratch(const SinkhornTask<T>& task) {
  Arena count{nullptr};
  Solver<T> solver;
  solver.layout(count, task.rows, task.cols);
  if (task.anderson) solver.anderson.layout(count, task.rows);
  count.take<int32_t>(task.rows), count.take<int32_t>(task.cols);
  return count.used;
}

template <class T> void sinkhorn_one(const SinkhornTask<T>& task, int64_t p, char* memory, Team* team) {
  const int64_t N = task.rows, M = task.cols;
  Arena arena{memory};
  int32_t *rows = arena.take<int32_t>(N), *cols = arena.take<int32_t>(M);
  const int64_t n = gather(task.row_mask ? task.row_mask + p * N : nullptr, N, rows);
  const int64_t m = gather(task.col_mask ? task.col_mask + p * M : nullptr, M, cols);
  T *f = task.f + p * N, *g = task.g + p * M;
  fill(f, N, T(0)), fill(g, M, T(0));
  task.n_iters[p] = 0, task.residual[p] = 0;

  Solver<T> s;
  s.layout(arena, n, m);
  s.team = team;
  s.accelerate = task.anderson && n >= Anderson::LEAST && m >= Anderson::LEAST;
  if (s.accelerate) s.anderson.layout(arena, n);
  T total_a = 0, total_b = 0;
  for (int64_t i = 0; i < n; ++i) total_a += s.rows.weight[i] = task.a[p * N + rows[i]];
  for (int64_t j = 0; j < m; ++j) total_b += s.cols.weight[j] = task.b[p * M + cols[j]];
  if (total_a <= 0 || total_b <= 0) return;  // nothing to transport

  const Chunks chunks = Chunks::of(n, m);
  Range<T> ranges[Chunks::MOST];
  for_chunks(team, chunks.count, [&](int64_t chunk) {
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i)
      put_row(s, i, task.cost + (p * N + rows[i]) * M, m < M ? cols : nullptr, ranges[chunk]);
  });
  Range<T>& range = ranges[0];
  for (int64_t chunk = 1; chunk < chunks.count; ++chunk) range.join(ranges[chunk]);
  s.begin(task.epsilon[p], task.tau_a, task.tau_b, task.mass ? task.mass[p] : 0.0, task.mass != nullptr);
  if (task.f_init)
    for (int64_t i = 0; i < n; ++i) s.rows.reference[i] = task.f_init[p * N + rows[i]];
  if (task.g_init)
    for (int64_t j = 0; j < m; ++j) s.cols.reference[j] = task.g_init[p * M + cols[j]];
  bool sound = range.finite && finite(total_a) && finite(total_b);
  for (int64_t i = 0; i < n; ++i) sound = sound && finite(s.rows.reference[i]);
  for (int64_t j = 0; j < m; ++j) sound = sound && finite(s.cols.reference[j]);
  if (sound)
    s.solve(double(range.low), double(range.high), task.max_iters, task.tol, task.f_init != nullptr, task.g_init != nullptr);
  task.n_iters[p] = int32_t(s.iterations);
  if (!sound || !s.sound) {  // say so instead of returning numbers
    const T nan = T(__builtin_nan(""));
    for (int64_t i = 0; i < n; ++i) f[rows[i]] = nan;
    for (int64_t j = 0; j < m; ++j) g[cols[j]] = nan;
    task.residual[p] = nan;
    return;
  }

  double shift = 0;
  if (!s.exact_mass && s.rows.tau == 1.0 && s.cols.tau == 1.0) {
    // f + c and g - c are the same plan: choose sum a f = sum b g, which treats rows and columns alike.
    double gap = 0, total = 0;
    for (int64_t i = 0; i < n; ++i) gap += double(s.rows.weight[i]) * s.row_potential(i), total += double(s.rows.weight[i]);
    for (int64_t j = 0; j < m; ++j) gap -= double(s.cols.weight[j]) * s.col_potential(j), total += double(s.cols.weight[j]);
    shift = gap / total;
  }
  for (int64_t i = 0; i < n; ++i) f[rows[i]] = T(s.row_potential(i) - shift);
  for (int64_t j = 0; j < m; ++j) g[cols[j]] = T(s.col_potential(j) + shift);
  task.residual[p] = T(s.residual);
}

}  // namespace
