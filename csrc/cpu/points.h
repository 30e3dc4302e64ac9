// Point clouds whose cost is never stored: one problem of each operation.
#pragma once
#include "points_product.h"
#include "points_solve.h"
#include "problem.h"

namespace {

// Memory of a problem: the solver's arrays, and copies of the points where a mask removes some.
template <class T> struct PointsProblem {
  PointSolver<T> s;
  int32_t *rows, *cols;
  T *x, *y;

  void layout(Arena& arena, const PointsTask<T>& task, int64_t n, int64_t m) {
    const bool two_sided = task.y != nullptr;
    rows = arena.take<int32_t>(task.rows), cols = arena.take<int32_t>(task.cols);
    x = arena.take<T>(task.row_mask ? n * task.dim : 0), y = arena.take<T>(task.col_mask ? m * task.dim : 0);
    s.layout(arena, n, m, task.dim, task.threads, two_sided);
    if (task.anderson) s.anderson.layout(arena, n);
  }

  // Gather what exists. False if there is nothing to transport.
  static bool gather_side(PointSide<T>& side, const PointsTask<T>& task, const T* points, const T* weights, const int32_t* index,
                          T* copy, bool masked, double tau) {
    double total = 0;
    for (int64_t i = 0; i < side.cloud.count; ++i) total += side.weight[i] = double(weights[index[i]]);
    if (total <= 0) return false;
    for (int64_t i = 0; masked && i < side.cloud.count; ++i)
      memcpy(copy + i * task.dim, points + index[i] * task.dim, size_t(task.dim) * sizeof(T));
    side.begin(masked ? copy : points, task.squared, tau);
    return true;
  }
  static bool start_side(PointSide<T>& side, const T* start, const int32_t* index) {
    bool sound = true;
    for (int64_t i = 0; start && i < side.cloud.count; ++i) {
      side.potential[i] = double(start[index[i]]);
      sound = sound && finite(side.potential[i]);
    }
    return sound;
  }
  // Whether points, weights and every cost are finite in T.
  bool finite_problem(const PointSide<T>& p, const PointSide<T>& q) const {
    double reach[2] = {0, 0}, total = 0;
    const PointSide<T>* sides[] = {&p, &q};
    bool sound = s.sound;
    for (int k = 0; k < 2; ++k) {
      const PointSide<T>& side = *sides[k];
      for (int64_t i = 0; i < side.cloud.count * side.cloud.dim; ++i) sound = sound && finite(side.cloud.points[i]);
      for (int64_t i = 0; i < side.cloud.count; ++i) reach[k] = larger(side.norm[i], reach[k]), total += side.weight[i];
    }
    const double cost = reach[0] + reach[1] + 2 * __builtin_sqrt(reach[0] * reach[1]);
    return sound && finite(T(total)) && finite(T(2 * cost)) && finite(T(2 * cost * s.rate));
  }
};

template <class T> size_t points_scratch_of(const PointsTask<T>& task) {
  Arena count{nullptr};
  PointsProblem<T> problem;
  problem.layout(count, task, task.rows, task.cols);
  return count.used;
}

template <class T> void points_solve_one(const PointsTask<T>& task, int64_t p, char* memory, Team* team) {
  const int64_t N = task.rows, M = task.cols, D = task.dim;
  T *f = task.f + p * N, *g = task.g + p * M;
  fill(f, N, T(0)), fill(g, M, T(0));
  task.n_iters[p] = 0, task.residual[p] = 0;
  Arena arena{memory};
  PointsProblem<T> problem;
  {
    Arena front{memory};
    problem.rows = front.take<int32_t>(N), problem.cols = front.take<int32_t>(M);
  }
  const int64_t n = gather(task.row_mask ? task.row_mask + p * N : nullptr, N, problem.rows);
  const int64_t m = gather(task.col_mask ? task.col_mask + p * M : nullptr, M, problem.cols);
  problem.layout(arena, task, n, m);
  PointSolver<T>& s = problem.s;
  s.team = team, s.pieces.begin();
  s.exact_mass = task.mass != nullptr, s.mass = task.mass ? task.mass[p] : 0.0;
  s.accelerate = task.anderson && n >= Anderson::LEAST && m >= Anderson::LEAST;
  if (!problem.gather_side(s.rows, task, task.x + p * N * D, task.a + p * N, problem.rows, problem.x, task.row_mask != nullptr,
                           s.exact_mass ? 1.0 : task.tau_a) ||
      !problem.gather_side(s.cols, task, task.y + p * M * D, task.b + p * M, problem.cols, problem.y, task.col_mask != nullptr,
                           s.exact_mass ? 1.0 : task.tau_b))
    return;  // nothing to transport
  if (!task.squared)  // cost = 1 - cos
    for (int64_t j = 0; j < s.cols.padded; ++j) s.cols.norm[j] = 0;
  s.begin(task.epsilon[p], task.squared ? 2.0 : 1.0);
  s.sound = problem.finite_problem(s.rows, s.cols);
  if (!problem.start_side(s.rows, task.f_init ? task.f_init + p * N : nullptr, problem.rows)) s.sound = false;
  if (!problem.start_side(s.cols, task.g_init ? task.g_init + p * M : nullptr, problem.cols)) s.sound = false;
  if (s.sound) s.solve(task.max_iters, task.tol, task.f_init != nullptr, task.g_init != nullptr);
  task.n_iters[p] = int32_t(s.iterations);
  if (!s.sound) {  // say so instead of returning numbers
    const T nan = T(__builtin_nan(""));
    for (int64_t i = 0; i < n; ++i) f[problem.rows[i]] = nan;
    for (int64_t j = 0; j < m; ++j) g[problem.cols[j]] = nan;
    task.residual[p] = nan;
    return;
  }
  double shift = 0;
  if (!s.exact_mass && task.tau_a == 1.0 && task.tau_b == 1.0) {
    // f + c and g - c are the same plan: choose sum a f = sum b g, which treats rows and columns alike.
    double gap = 0, total = 0;
    for (int64_t i = 0; i < n; ++i) gap += s.rows.weight[i] * s.rows.potential[i], total += s.rows.weight[i];
    for (int64_t j = 0; j < m; ++j) gap -= s.cols.weight[j] * s.cols.potential[j], total += s.cols.weight[j];
    shift = gap / total;
  }
  for (int64_t i = 0; i < n; ++i) f[problem.rows[i]] = T(s.rows.potential[i] - shift);
  for (int64_t j = 0; j < m; ++j) g[problem.cols[j]] = T(s.cols.potential[j] + shift);
  task.residual[p] = T(s.residual);
}

// A cloud against itself: f <- (f + tau T(f)) / 2 with T the one transform that it needs; y, b and g are not read.
template <class T> void points_self_one(const PointsTask<T>& task, int64_t p, char* memory, Team* team) {
  const int64_t N = task.rows, D = task.dim;
  T* f = task.f + p * N;
  fill(f, N, T(0));
  task.n_iters[p] = 0, task.residual[p] = 0;
  Arena arena{memory};
  PointsProblem<T> problem;
  problem.rows = Arena{memory}.take<int32_t>(N);
  const int64_t n = gather(task.row_mask ? task.row_mask + p * N : nullptr, N, problem.rows);
  problem.layout(arena, task, n, 0);
  PointSolver<T>& s = problem.s;
  PointSide<T>& side = s.rows;
  s.team = team;
  if (!problem.gather_side(side, task, task.x + p * N * D, task.a + p * N, problem.rows, problem.x, task.row_mask != nullptr,
                           task.tau_a))
    return;
  s.begin(task.epsilon[p], task.squared ? 2.0 : 1.0);
  s.sound = problem.finite_problem(side, side);
  if (!task.squared)
    for (int64_t i = 0; i < side.padded; ++i) side.norm[i] = 0.5;  // 1 - cos, a half from either side
  while (s.sound && s.iterations < task.max_iters && !(s.residual < task.tol)) {
    ++s.iterations;
    s.log_sums(side, side);
    double moved = 0;
    for (int64_t i = 0; s.sound && i < n; ++i) {
      const double image = -s.eps * side.tau * side.soft[i];
      moved = larger(magnitude(image - side.potential[i]), moved);
      side.potential[i] = (side.potential[i] + image) / 2;
      s.sound = finite(T(side.potential[i]));
    }
    s.residual = double(T(moved / s.eps));
  }
  task.n_iters[p] = int32_t(s.iterations);
  task.residual[p] = s.sound ? T(s.residual) : T(__builtin_nan(""));
  for (int64_t i = 0; i < n; ++i) f[problem.rows[i]] = s.sound ? T(side.potential[i]) : T(__builtin_nan(""));
}

// f = -epsilon log sum_j exp(b_j + (g_j - cost_ij) / epsilon): b holds logs of weights, g is `g_init`.
template <class T> void points_transform_one(const PointsTask<T>& task, int64_t p, char* memory, Team* team) {
  const int64_t N = task.rows, M = task.cols, D = task.dim;
  Arena arena{memory};
  PointsProblem<T> problem;
  problem.layout(arena, task, N, M);
  PointSolver<T>& s = problem.s;
  s.team = team;
  for (int64_t i = 0; i < N; ++i) s.rows.weight[i] = 1;
  for (int64_t j = 0; j < M; ++j) s.cols.weight[j] = 1;
  s.rows.begin(task.x + p * N * D, task.squared, 1.0), s.cols.begin(task.y + p * M * D, task.squared, 1.0);
  if (!task.squared)
    for (int64_t j = 0; j < s.cols.padded; ++j) s.cols.norm[j] = 0;
  s.begin(task.epsilon[p], task.squared ? 2.0 : 1.0);
  s.sound = problem.finite_problem(s.rows, s.cols);
  for (int64_t j = 0; j < M; ++j) {
    s.cols.log_weight[j] = double(task.b[p * M + j]), s.cols.potential[j] = double(task.g_init[p * M + j]);
    s.sound = s.sound && finite(s.cols.potential[j]) && s.cols.log_weight[j] < __builtin_inf();
  }
  if (s.sound) s.log_sums(s.cols, s.rows);
  for (int64_t i = 0; i < N; ++i) task.f[p * N + i] = s.sound ? T(-s.eps * s.rows.soft[i]) : T(__builtin_nan(""));
}

}  // namespace
