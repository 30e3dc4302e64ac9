// The plan of a solved problem, its sums, and their gradient: one pass over the cost each, one exponential an element.
#pragma once
#include "density.h"

namespace {

template <class T> struct PlanRows {  // rows of one chunk: their own buffers, and partial sums over rows
  T *cost, *other, *sums;
  static PlanRows take(Arena& arena, int64_t padded) {
    return {arena.take<T>(padded), arena.take<T>(padded), arena.take<T>(padded)};
  }
};

template <class T> struct PlanWork {
  Density<T, T> problem;
  PlanRows<T> rows[RowParts::MOST];
  T* from_sums;  // gradient with respect to the sums over rows
  double totals[RowParts::MOST];
  void layout(Arena& arena, int64_t N, int64_t M) {
    problem.layout(arena, N, M);
    from_sums = arena.take<T>(round_up(M, LANES<T>));
    const RowParts chunks(N, M);
    for (int64_t c = 0; c < chunks.count; ++c) rows[c] = PlanRows<T>::take(arena, round_up(M, LANES<T>));
  }
  // work(rows of the chunk, first row, end) -> its part of a sum over the problem; the sum of the parts comes back.
  template <class Work> double in_chunks(Team* team, Work&& work) {
    const RowParts chunks(problem.n, problem.m);
    for_chunks(team, chunks.count, [&](int64_t c) { totals[c] = work(rows[c], chunks.begin(c), chunks.begin(c + 1)); });
    double total = 0;
    for (int64_t c = 0; c < chunks.count; ++c) total += totals[c];
    return total;
  }
  // Sum over the chunks of the sums over their rows, left in those of the first chunk.
  T* sums_over_rows() {
    const RowParts chunks(problem.n, problem.m);
    for (int64_t c = 1; c < chunks.count; ++c)
      for (int64_t j = 0; j < problem.padded; j += LANES<T>)
        store<T>(rows[0].sums + j, load<T>(rows[0].sums + j) + load<T>(rows[c].sums + j));
    return rows[0].sums;
  }
};

template <class T> size_t plan_scratch(const Solved<T>& problem) {
  Arena count{nullptr};
  PlanWork<T> work;
  work.layout(count, problem.rows, problem.cols);
  return count.used;
}

// (f + g - C) / epsilon + log a + log b, -inf where masked or without weight.
template <class T> void log_plan(PlanWork<T>& work, T* plan, int64_t entries, Team* team) {
  Density<T, T>& d = work.problem;
  T* log_b = work.from_sums;
  for (int64_t j = 0; j < d.padded; ++j) log_b[j] = T(__builtin_log(double(d.b[j])));
  if (d.n * d.m < entries)
    for (int64_t k = 0; k < entries; ++k) plan[k] = -T(__builtin_inf());
  work.in_chunks(team, [&](PlanRows<T>& rows, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      d.read_cost(i, rows.cost);
      const T log_a = T(__builtin_log(double(d.a[i])));
      for (int64_t j = 0; j < d.m; ++j) {
        const T x = (d.f[i] + d.g[j] - rows.cost[j]) * d.inv_eps;
        rows.other[j] = x + x * d.correction + (log_a + log_b[j]);
      }
      d.write(plan, i, rows.other);
    }
    return 0.0;
  });
}

template <class T> void plan_one(const PlanTask<T>& task, int64_t p, char* memory, Team* team) {
  const int64_t N = task.problem.rows, M = task.problem.cols;
  Arena arena{memory};
  PlanWork<T> work;
  work.layout(arena, N, M);
  Density<T, T>& d = work.problem;
  d.begin(task.problem, p);
  T* plan = task.plan + p * N * M;
  if (task.logarithm) {
    log_plan(work, plan, N * M, team);
    return;
  }
  clear_unless_whole(plan, N, M, d.n, d.m);
  work.in_chunks(team, [&](PlanRows<T>& rows, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      d.read_cost(i, rows.cost);
      const Vec<T> weight = splat<T>(d.a[i]);
      d.each(i, rows.cost, [&](int64_t j, Vec<T>, Vec<T> e) { store<T>(rows.other + j, e * weight * load<T>(d.b + j)); });
      d.write(plan, i, rows.other);
    }
    return 0.0;
  });
}

template <class T> void plan_sums_one(const PlanSumsTask<T>& task, int64_t p, char* memory, Team* team) {
  const int64_t N = task.problem.rows, M = task.problem.cols;
  Arena arena{memory};
  PlanWork<T> work;
  work.layout(arena, N, M);
  Density<T, T>& d = work.problem;
  d.begin(task.problem, p);
  T *row_sums = task.rows + p * N, *col_sums = task.cols + p * M;
  memset(row_sums, 0, size_t(N) * sizeof(T)), memset(col_sums, 0, size_t(M) * sizeof(T));
  const double energy = work.in_chunks(team, [&](PlanRows<T>& rows, int64_t first, int64_t end) {
    memset(rows.sums, 0, size_t(d.padded) * sizeof(T));
    double energy = 0;
    for (int64_t i = first; i < end; ++i) {
      d.read_cost(i, rows.cost);
      const Vec<T> weight = splat<T>(d.a[i]);
      Vec<T> sum{}, costs{};
      d.each(i, rows.cost, [&](int64_t j, Vec<T>, Vec<T> e) {
        const Vec<T> mass = e * weight * load<T>(d.b + j);
        sum += mass, costs += mass * load<T>(rows.cost + j);
        store<T>(rows.sums + j, load<T>(rows.sums + j) + mass);
      });
      row_sums[d.row_index[i]] = sum_lanes<T>(sum);
      energy += double(sum_lanes<T>(costs));
    }
    return energy;
  });
  task.energy[p] = T(energy);
  scatter_values(col_sums, work.sums_over_rows(), d.col_index, d.m);
}

// With G the gradient with respect to an entry of the plan (its own, those of its two sums, energy_bar C) and
// h = density G:  a_bar = sum_j h b, b_bar = sum_i h a, f_bar = a a_bar / epsilon, cost_bar = energy_bar plan - h a b / epsilon.
template <class T> void plan_backward_one(const PlanBackwardTask<T>& task, int64_t p, char* memory, Team* team) {
  const int64_t N = task.problem.rows, M = task.problem.cols;
  Arena arena{memory};
  PlanWork<T> work;
  work.layout(arena, N, M);
  Density<T, T>& d = work.problem;
  d.begin(task.problem, p);
  T *cost_bar = task.cost + p * N * M, *f_bar = task.f + p * N, *g_bar = task.g + p * M;
  T *a_bar = task.a + p * N, *b_bar = task.b + p * M;
  clear_unless_whole(cost_bar, N, M, d.n, d.m);
  memset(f_bar, 0, size_t(N) * sizeof(T)), memset(a_bar, 0, size_t(N) * sizeof(T));
  memset(g_bar, 0, size_t(M) * sizeof(T)), memset(b_bar, 0, size_t(M) * sizeof(T));
  memset(work.from_sums, 0, size_t(d.padded) * sizeof(T));
  if (task.grad_cols) gather_values(work.from_sums, task.grad_cols + p * M, d.col_index, d.m);
  const T energy_bar = task.grad_energy ? task.grad_energy[p] : T(0);
  const double by_exponent = work.in_chunks(team, [&](PlanRows<T>& rows, int64_t first, int64_t end) {
    memset(rows.sums, 0, size_t(d.padded) * sizeof(T));
    memset(rows.other, 0, size_t(d.padded) * sizeof(T));
    double by_exponent = 0;
    for (int64_t i = first; i < end; ++i) {
      const int64_t row = d.row_index[i];
      d.read_cost(i, rows.cost);
      if (task.grad_plan) gather_values(rows.other, task.grad_plan + (p * N + row) * M, d.col_index, d.m);
      else memset(rows.other, 0, size_t(d.padded) * sizeof(T));
      const Vec<T> from_row = splat<T>(task.grad_rows ? task.grad_rows[p * N + row] : T(0));
      const Vec<T> energy = splat<T>(energy_bar), weight = splat<T>(d.a[i]), inv_eps = splat<T>(d.inv_eps);
      Vec<T> sum{}, products{};
      d.each(i, rows.cost, [&](int64_t j, Vec<T> x, Vec<T> e) {
        const Vec<T> grad = load<T>(rows.other + j) + (from_row + load<T>(work.from_sums + j)) + energy * load<T>(rows.cost + j);
        const Vec<T> h = e * grad, b = load<T>(d.b + j), hb = h * b;
        sum += hb, products += hb * x;
        store<T>(rows.sums + j, load<T>(rows.sums + j) + weight * h);
        store<T>(rows.other + j, weight * (energy * e * b - inv_eps * hb));
      });
      d.write(cost_bar, i, rows.other);
      for (int64_t j = d.m; j < d.padded; ++j) rows.other[j] = 0;
      const T total = sum_lanes<T>(sum);
      a_bar[row] = total, f_bar[row] = T(double(d.a[i]) * double(total) / d.eps);
      by_exponent += double(d.a[i]) * double(sum_lanes<T>(products));
    }
    return by_exponent;
  });
  task.epsilon[p] = -by_exponent / d.eps;
  T* sums = work.sums_over_rows();
  scatter_values(b_bar, sums, d.col_index, d.m);
  for (int64_t j = 0; j < d.m; ++j) sums[j] = T(double(d.b[j]) * double(sums[j]) / d.eps);
  scatter_values(g_bar, sums, d.col_index, d.m);
}

}  // namespace
