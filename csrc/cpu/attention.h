// Transport attention: cost, solve and fusion of one head in scratch memory, and the gradient of the fusion.
#pragma once
#include "token_cost.h"

namespace {

// Memory of a head. Distances are tabulated where K will be.
template <class T> struct HeadMemory {
  static constexpr int64_t PIECES = 8;
  Solver<T> solver;
  Mean<T>* means;    // [n]
  Range<T>* ranges;  // [n]
  T* buffers;        // [PIECES, cols] rows of the cost on their way into the panels

  void layout(Arena& arena, int64_t n, int64_t cols) {
    solver.layout(arena, n, cols);
    means = arena.take<Mean<T>>(n), ranges = arena.take<Range<T>>(n), buffers = arena.take<T>(PIECES * cols);
  }
};

template <class T> AttentionBytes attention_bytes(const AttentionTask<T>& task) {
  const CostTask<T>& shape = task.cost;
  Arena shared{nullptr}, head{nullptr};
  shared.take<Sample<T>>(1);
  Sample<T>().layout(shared, shape.rows, shape.cols, true);
  HeadMemory<T>().layout(head, shape.rows, shape.cols);
  return {shared.used, size_t(CosineShape<T>{shape.rows, shape.dim}.packed()) * sizeof(T), head.used};
}

template <class T> void attention_sample(const AttentionTask<T>& task, int64_t b, char* shared, char* scratch, Team* team) {
  Arena arena{shared};
  Sample<T>& s = *arena.take<Sample<T>>(1);
  s.layout(arena, task.cost.rows, task.cost.cols, true);
  read_sample(task.cost, b, s, reinterpret_cast<T*>(scratch), team);
}

// Scaled cost of a head into the panels of its solver. Returns the range of the raw cost.
template <class T>
Range<T> build_cost(const CostTask<T>& task, const Sample<T>& s, int64_t head, HeadMemory<T>& own, Team* team) {
  const int64_t n = s.n, M = s.cols;
  const RowChunks chunks(n, M, HeadMemory<T>::PIECES);
  const auto table_of = [&](int64_t i) { return own.solver.K + i * own.solver.panels * PANEL<T>; };
  for_chunks(team, chunks.count(), [&](int64_t chunk) {
    T* table = table_of(chunks.begin(chunk));
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      const T* attention = task.attention + (head * task.rows + s.rows[i]) * M;
      own.means[i] = mean_under(s, attention, attention + M);
      fill_table(s, own.means[i], table);
      own.ranges[i] = Range<T>();
      see_row(s, i, own.means[i], table, own.ranges[i]);
    }
  });
  Range<T> range;
  for (int64_t i = 0; i < n; ++i) range.join(own.ranges[i]);
  for_chunks(team, chunks.count(), [&](int64_t chunk) {
    T *table = table_of(chunks.begin(chunk)), *row = own.buffers + chunk * M;
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      fill_table(s, own.means[i], table);
      write_row(s, i, own.means[i], table, &range, row);
      put_row(own.solver, i, row);
    }
  });
  return range;
}

// softmax(log(A + c) + log(P + c)) = (A + c)(P + c) / sum (A + c)(P + c) of one row: no exponential is left.
template <class T> void fuse_row(const Solver<T>& s, int64_t i, const T* attention, T* refined, T* plan) {
  const Vec<T> floor = splat<T>(T(1e-6)), scale = splat<T>(s.rows.sum[i] > 0 ? T(1) / s.rows.sum[i] : T(0));
  const Vec<T> weight = splat<T>(s.rows.scaled_weight[i]);
  Vec<T> sums{};
  for (int64_t p = 0; p < s.panels; ++p) {
    const T *kernel = s.entry(s.K, i, p * PANEL<T>), *v = s.cols.scaled_weight + p * PANEL<T>;
    Vec<T> panel_sum{};
    for (int64_t k = 0; k < PANEL<T>; k += LANES<T>) {
      const int64_t j = p * PANEL<T> + k, left = s.m - j;
      if (left <= 0) break;
      const Vec<T> mass = load<T>(kernel + k) * load<T>(v + k);
      if (left >= LANES<T>) {
        const Vec<T> w = (load_any<T>(attention + j) + floor) * (mass * scale + floor);
        store_any<T>(refined + j, w);
        if (plan) store_any<T>(plan + j, mass * weight);
        panel_sum += w;
      } else {
        const Vec<T> share = mass * weight;
        Vec<T> w = (load_some<T>(attention + j, left) + floor) * (mass * scale + floor);
        memcpy(refined + j, &w, size_t(left) * sizeof(T));
        if (plan) memcpy(plan + j, &share, size_t(left) * sizeof(T));
        panel_sum += load_some<T>(refined + j, left);
      }
    }
    sums += panel_sum;
  }
  const T norm = T(1) / sum_lanes<T>(sums);
  for (int64_t j = 0; j < s.m; ++j) refined[j] *= norm;
}

template <class T>
void attention_one(const AttentionTask<T>& task, int64_t head, const char* shared, char* memory, Team* team) {
  const CostTask<T>& shape = task.cost;
  const int64_t N = shape.rows, M = shape.cols, b = head / shape.heads;
  const Sample<T>& sample = *reinterpret_cast<const Sample<T>*>(shared);
  const int64_t n = sample.n, row_bytes = M * int64_t(sizeof(T));
  if (n < N)
    for (int64_t i = 0; i < N; ++i)
      if (!shape.row_mask[b * N + i]) {
        const int64_t at = (head * N + i) * M;
        memcpy(task.refined + at, shape.attention + at, size_t(row_bytes));
        if (task.plan) memset(task.plan + at, 0, size_t(row_bytes));
      }
  if (n == 0) return;
  Arena arena{memory};
  HeadMemory<T> own;
  own.layout(arena, n, M);
  Solver<T>& s = own.solver;
  s.team = team;
  fill(s.rows.weight, n, T(1) / T(n)), fill(s.cols.weight, M, T(1) / T(M));
  const Range<T> range = build_cost(shape, sample, head, own, team);
  const bool with_mass = task.mass > 0;
  s.begin(task.epsilon, with_mass ? 1.0 : task.tau, with_mass ? 1.0 : task.tau, task.mass, with_mass);
  const double top = double((range.high - range.low) / divisor_of(range));
  if (range.finite) s.solve(0.0, top, task.max_iters, task.tol, false, false);
  const bool sound = range.finite && s.sound;
  if (sound) s.prepare_rows();
  const RowChunks chunks(n, M, HeadMemory<T>::PIECES);
  for_chunks(team, chunks.count(), [&](int64_t chunk) {
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      const int64_t at = (head * N + sample.rows[i]) * M;
      T* plan = task.plan ? task.plan + at : nullptr;
      if (sound) {
        fuse_row(s, i, shape.attention + at, task.refined + at, plan);
      } else {  // say so instead of returning numbers
        fill(task.refined + at, M, T(__builtin_nan("")));
        if (plan) fill(plan, M, T(__builtin_nan("")));
      }
    }
  });
}

// attention_bar = refined (refined_bar - sum_j refined refined_bar) / (attention + 1e-6), for rows [first, last) of all heads.
template <class T> void fusion_gradient_rows(const FusionGradientTask<T>& task, int64_t first, int64_t last) {
  constexpr int64_t VL = LANES<T>, BLOCK_COLS = 64 * VL;
  const int64_t N = task.rows, M = task.cols;
  for (int64_t r = first; r < last; ++r) {
    const T *grad = task.grad + r * M, *attention = task.attention + r * M, *refined = task.refined + r * M;
    T* result = task.result + r * M;
    if (task.row_mask && !task.row_mask[r / (N * task.heads) * N + r % N]) {
      memcpy(result, grad, size_t(M) * sizeof(T));
      continue;
    }
    Vec<T> sums{};
    for (int64_t from = 0; from < M; from += BLOCK_COLS) {  // the rounding of one long chain of additions would show
      const int64_t to = from + BLOCK_COLS < M ? from + BLOCK_COLS : M;
      Vec<T> block{};
      int64_t j = from;
      for (; j + VL <= to; j += VL) block += load_any<T>(grad + j) * load_any<T>(refined + j);
      if (j < to) block += load_some<T>(grad + j, to - j) * load_some<T>(refined + j, to - j);
      sums += block;
    }
    const T dot = sum_lanes<T>(sums);
    for (int64_t j = 0; j < M; ++j) result[j] = refined[j] / (attention[j] + T(1e-6)) * (grad[j] - dot);
  }
}

}  // namespace
