// What one worker does with one problem: gather the rows and columns that exist, solve, scatter; the token cost of one
// head; and cost, solve and fusion of one head in scratch memory.
#pragma once
#include "../api.h"
#include "solver.h"

namespace {
using namespace pk;

// Indices of the entries that exist. Returns how many.
inline int64_t gather(const uint8_t* mask, int64_t count, int32_t* index) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i)
    if (mask == nullptr || mask[i]) index[kept++] = int32_t(i);
  return kept;
}

template <class T> struct Range {  // smallest and largest of what was seen; finite is false after any inf or NaN
  T low = T(__builtin_inf()), high = -T(__builtin_inf());
  bool finite = true;
  void see(const T* x, int64_t count) {
    Vec<T> lo = splat<T>(low), hi = splat<T>(high), zero{};
    int64_t j = 0;
    for (; j + LANES<T> <= count; j += LANES<T>) {
      const Vec<T> v = load_any<T>(x + j);
      lo = vmin<T>(v, lo), hi = vmax<T>(v, hi);
      zero += v - v;  // NaN as soon as one entry is not finite
    }
    low = min_lanes<T>(lo), high = max_lanes<T>(hi);
    T rest = sum_lanes<T>(zero);
    for (; j < count; ++j) {
      low = x[j] < low ? x[j] : low, high = x[j] > high ? x[j] : high;
      rest += x[j] - x[j];
    }
    finite = finite && rest == 0;
  }
};

// Copy a row of m entries into the panels as row i; padding is inf.
template <class T> void put_row(Solver<T>& s, int64_t i, const T* row) {
  for (int64_t p = 0; p < s.panels; ++p) {
    T* to = s.C + (p * s.n + i) * PANEL<T>;
    const int64_t first = p * PANEL<T>, real = s.m - first < PANEL<T> ? s.m - first : PANEL<T>;
    memcpy(to, row + first, size_t(real) * sizeof(T));
    for (int64_t k = real; k < PANEL<T>; ++k) to[k] = T(__builtin_inf());
  }
}

template <class T> size_t scratch_of(int64_t rows, int64_t cols, bool anderson) {
  Arena count{nullptr};
  Solver<T> solver;
  solver.layout(count, rows, cols);
  if (anderson) solver.anderson.layout(count, rows);
  count.take<int32_t>(rows), count.take<int32_t>(cols), count.take<T>(cols + LANES<T>);
  return count.used;
}
size_t scratch(int64_t rows, int64_t cols, size_t element, bool anderson) {
  return element == sizeof(float) ? scratch_of<float>(rows, cols, anderson) : scratch_of<double>(rows, cols, anderson);
}

template <class T> void fill(T* x, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) x[i] = value;
}

template <class T> void sinkhorn_one(const SinkhornTask<T>& task, int64_t p, char* memory) {
  const int64_t N = task.rows, M = task.cols;
  Arena arena{memory};
  int32_t *rows = arena.take<int32_t>(N), *cols = arena.take<int32_t>(M);
  T* row = arena.take<T>(M + LANES<T>);
  const int64_t n = gather(task.row_mask ? task.row_mask + p * N : nullptr, N, rows);
  const int64_t m = gather(task.col_mask ? task.col_mask + p * M : nullptr, M, cols);
  T *f = task.f + p * N, *g = task.g + p * M;
  fill(f, N, T(0)), fill(g, M, T(0));
  task.n_iters[p] = 0, task.residual[p] = 0;

  Solver<T> s;
  s.layout(arena, n, m);
  s.accelerate = task.anderson && n >= Anderson::LEAST && m >= Anderson::LEAST;
  if (s.accelerate) s.anderson.layout(arena, n);
  T total_a = 0, total_b = 0;
  for (int64_t i = 0; i < n; ++i) total_a += s.rows.weight[i] = task.a[p * N + rows[i]];
  for (int64_t j = 0; j < m; ++j) total_b += s.cols.weight[j] = task.b[p * M + cols[j]];
  if (total_a <= 0 || total_b <= 0) return;  // nothing to transport

  Range<T> range;
  for (int64_t i = 0; i < n; ++i) {
    const T* source = task.cost + (p * N + rows[i]) * M;
    if (m < M) {
      for (int64_t j = 0; j < m; ++j) row[j] = source[cols[j]];
      source = row;
    }
    range.see(source, m);
    put_row(s, i, source);
  }
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

// Unscaled cost of text token i in head h against all video tokens, to row[0..M).
template <class T> void cost_row(const CostTask<T>& task, int64_t head, int64_t i, T* __restrict__ row) {
  const int64_t b = head / task.heads, M = task.cols;
  const T* __restrict__ attention = task.attention + (head * task.rows + i) * M;
  const T* __restrict__ similarity = task.similarity + (b * task.rows + i) * M;
  const T *__restrict__ t = task.frame + b * M, *__restrict__ y = task.place_y + b * M, *__restrict__ x = task.place_x + b * M;
  Vec<T> total{}, sum_t{}, sum_y{}, sum_x{};
  int64_t j = 0;
  for (; j + LANES<T> <= M; j += LANES<T>) {
    const Vec<T> w = load_any<T>(attention + j);
    total += w, sum_t += w * load_any<T>(t + j), sum_y += w * load_any<T>(y + j), sum_x += w * load_any<T>(x + j);
  }
  T all = sum_lanes<T>(total), mt = sum_lanes<T>(sum_t), my = sum_lanes<T>(sum_y), mx = sum_lanes<T>(sum_x);
  for (; j < M; ++j) all += attention[j], mt += attention[j] * t[j], my += attention[j] * y[j], mx += attention[j] * x[j];
  const T scale = T(1) / (all > T(1e-6) ? all : T(1e-6));
  mt *= scale, my *= scale, mx *= scale;
  const T time = task.time_weight[b], place = task.place_weight;
  for (j = 0; j < M; ++j) {
    const T dy = my - y[j], dx = mx - x[j], dt = mt - t[j];
    row[j] = (T(1) - similarity[j]) + time * (dt < 0 ? -dt : dt) + place * T(__builtin_sqrt(dy * dy + dx * dx));
  }
}

template <class T> void token_cost_one(const CostTask<T>& task, int64_t head) {
  const int64_t N = task.rows, M = task.cols, b = head / task.heads;
  const uint8_t *rows = task.row_mask ? task.row_mask + b * N : nullptr, *cols = task.col_mask ? task.col_mask + b * M : nullptr;
  T* cost = task.cost + head * N * M;
  Range<T> range;
  for (int64_t i = 0; i < N; ++i) {
    T* row = cost + i * M;
    if (rows && !rows[i]) continue;
    cost_row(task, head, i, row);
    if (!cols) {
      range.see(row, M);
    } else {
      for (int64_t j = 0; j < M; ++j)
        if (cols[j]) range.see(row + j, 1);
    }
  }
  const T span = range.high - range.low, divisor = span > T(1e-6) ? span : T(1e-6);
  const T nan = T(__builtin_nan(""));
  for (int64_t i = 0; i < N; ++i) {
    T* row = cost + i * M;
    if (rows && !rows[i]) {
      fill(row, M, T(0));
      continue;
    }
    if (task.normalize) {
      // A division, so that the largest entry is exactly 1: the gradient looks for it. NaN in, NaN out.
      if (!range.finite) fill(row, M, nan);
      else
        for (int64_t j = 0; j < M; ++j) row[j] = (row[j] - range.low) / divisor;
    }
    if (cols)
      for (int64_t j = 0; j < M; ++j)
        if (!cols[j]) row[j] = 0;
  }
}

template <class T> void attention_one(const AttentionTask<T>& task, int64_t head, char* memory) {
  const CostTask<T>& shape = task.cost;
  const int64_t N = shape.rows, M = shape.cols, b = head / shape.heads;
  Arena arena{memory};
  int32_t* rows = arena.take<int32_t>(N);
  arena.take<int32_t>(M);
  T* row = arena.take<T>(M + LANES<T>);
  const int64_t n = gather(shape.row_mask ? shape.row_mask + b * N : nullptr, N, rows);
  if (n == 0) return;
  Solver<T> s;
  s.layout(arena, n, M);
  fill(s.rows.weight, n, T(1) / T(n)), fill(s.cols.weight, M, T(1) / T(M));
  Range<T> range;
  for (int64_t i = 0; i < n; ++i) {
    cost_row(shape, head, rows[i], row);
    range.see(row, M);
    put_row(s, i, row);
  }
  const T span = range.high - range.low, divisor = span > T(1e-6) ? span : T(1e-6);
  for (int64_t k = 0; k < n * s.cols.padded; ++k) s.C[k] = (s.C[k] - range.low) / divisor;  // padding stays inf
  const bool with_mass = task.mass > 0;
  s.begin(task.epsilon, with_mass ? 1.0 : task.tau, with_mass ? 1.0 : task.tau, task.mass, with_mass);
  if (range.finite) s.solve(0.0, double(span / divisor), task.max_iters, task.tol, false, false);
  if (!range.finite || !s.sound) {
    for (int64_t i = 0; i < n; ++i) {
      fill(task.refined + (head * N + rows[i]) * M, M, T(__builtin_nan("")));
      if (task.plan) fill(task.plan + (head * N + rows[i]) * M, M, T(__builtin_nan("")));
    }
    return;
  }
  s.prepare_rows();

  // softmax(log(A + c) + log(P + c)) = (A + c)(P + c) / sum (A + c)(P + c): no exponential is left.
  const T floor = T(1e-6);
  for (int64_t i = 0; i < n; ++i) {
    const T* attention = shape.attention + (head * N + rows[i]) * M;
    T* refined = task.refined + (head * N + rows[i]) * M;
    T* plan = task.plan ? task.plan + (head * N + rows[i]) * M : nullptr;
    const T scale = s.rows.sum[i] > 0 ? T(1) / s.rows.sum[i] : T(0);
    Vec<T> sums{};
    T rest = 0;
    for (int64_t p = 0; p < s.panels; ++p) {
      const T *kernel = s.K + (p * n + i) * PANEL<T>, *v = s.cols.scaled_weight + p * PANEL<T>;
      const int64_t first = p * PANEL<T>, real = M - first < PANEL<T> ? M - first : PANEL<T>;
      if (real == PANEL<T>) {
        for (int64_t k = 0; k < real; k += LANES<T>) {
          const Vec<T> mass = load<T>(kernel + k) * load<T>(v + k);
          const Vec<T> w = (load_any<T>(attention + first + k) + splat<T>(floor)) * (mass * splat<T>(scale) + splat<T>(floor));
          store_any<T>(refined + first + k, w);
          if (plan) store_any<T>(plan + first + k, mass * splat<T>(s.rows.scaled_weight[i]));
          sums += w;
        }
      } else {
        for (int64_t k = 0; k < real; ++k) {
          const T mass = kernel[k] * v[k], w = (attention[first + k] + floor) * (mass * scale + floor);
          refined[first + k] = w, rest += w;
          if (plan) plan[first + k] = mass * s.rows.scaled_weight[i];
        }
      }
    }
    const T norm = T(1) / (sum_lanes<T>(sums) + rest);
    for (int64_t j = 0; j < M; ++j) refined[j] *= norm;
  }
}

}  // namespace
