// Half iterations by log-sum-exp, for potentials whose kernel matrix T cannot hold.
#pragma once
#include "kernel_matrix.h"

namespace {

// Log-sums of both sides take the exponent (f_i + g_j - C_ij) / epsilon as K does, the summed side's scaling with its weight.
template <class T> void begin_log_sums(State<T>& s, Side<T>& summed) {
  s.fit_grid(larger(s.top(s.rows), s.top(s.cols)));
  s.split_all(s.rows, false), s.split_all(s.cols, false);
  for (int64_t i = 0; i < summed.padded; ++i) summed.next[i] = summed.log_scaling[i] + summed.log_weight[i];
}
template <class T> constexpr T LOWEST = T(-1e30);  // stands for -inf where a difference is taken

// soft_i = log sum_j b_j exp((g_j + epsilon lv_j - C_ij) / epsilon)
template <class T> void log_rows(State<T>& s) {
  constexpr int VL = LANES<T>;
  begin_log_sums(s, s.cols);
  const T *g = s.cols.reference, *offset = s.cols.next;
  const Vec<T> scale = splat<T>(s.inv_eps);
  for (int64_t i = 0; i < s.n; ++i) {
    const Vec<T> fi = splat<T>(s.rows.reference[i]);
    Vec<T> top = splat<T>(LOWEST<T>), sum{};
    for (int64_t j = 0; j < s.cols.padded; j += VL)
      top = vmax<T>(((fi + load<T>(g + j)) - load<T>(s.entry(s.C, i, j))) * scale + load<T>(offset + j), top);
    const T peak = max_lanes<T>(top);
    for (int64_t j = 0; j < s.cols.padded; j += VL)
      sum += vexp<T>(((fi + load<T>(g + j)) - load<T>(s.entry(s.C, i, j))) * scale + load<T>(offset + j) - splat<T>(peak));
    s.rows.soft[i] = double(peak) + log_of(double(sum_lanes<T>(sum))) - double(s.rows.reference[i]) / s.eps;
  }
}

// soft_j = log sum_i a_i exp((f_i + epsilon lu_i - C_ij) / epsilon)
template <class T> void log_cols(State<T>& s) {
  constexpr int VL = LANES<T>;
  begin_log_sums(s, s.rows);
  const T *f = s.rows.reference, *offset = s.rows.next;
  const Vec<T> scale = splat<T>(s.inv_eps);
  for (int64_t j = 0; j < s.m; j += VL) {
    const Vec<T> gj = load<T>(s.cols.reference + j);
    Vec<T> top = splat<T>(LOWEST<T>), sum{};
    for (int64_t i = 0; i < s.n; ++i)
      top = vmax<T>(((splat<T>(f[i]) + gj) - load<T>(s.entry(s.C, i, j))) * scale + splat<T>(offset[i]), top);
    for (int64_t first = 0; first < s.n; first += BLOCK) {  // the rounding of one long chain of additions would show
      Vec<T> block{};
      for (int64_t i = first; i < first + BLOCK && i < s.n; ++i)
        block += vexp<T>(((splat<T>(f[i]) + gj) - load<T>(s.entry(s.C, i, j))) * scale + splat<T>(offset[i]) - top);
      sum += block;
    }
    for (int k = 0; k < VL && j + k < s.m; ++k)
      s.cols.soft[j + k] = double(top[k]) + log_of(double(sum[k])) - double(gj[k]) / s.eps;
  }
}

// Potentials from the log-sums, -epsilon tau soft. Returns the largest change in units of epsilon.
template <class T> double set_from_soft(State<T>& s, Side<T>& side) {
  double moved = 0;
  for (int64_t i = 0; i < side.count; ++i) {
    const double before = side.potential(i, s.eps), after = -s.eps * side.tau * side.soft[i];
    moved = larger(magnitude(after - before) / s.eps, moved);
    s.sound = s.sound && finite(T(after));
    s.split(side, i, after, after);
  }
  return moved;
}

}  // namespace
