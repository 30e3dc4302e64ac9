// Half iterations by log-sum-exp, for potentials whose kernel matrix T cannot hold.
#pragma once
#include "kernel_matrix.h"

namespace {

// The terms of a log-sum are exp((base_i + g_j - C_ij) / epsilon + lv_j + log b_j): the base stands for the potential of the
// side that is updated, the other side has its own. The base is near the last potential before damping, in side.next: sums
// are then near 1, and no maximum has to be found first.
template <class T> void begin_log_sums(State<T>& s, Side<T>& side, Side<T>& summed) {
  s.settle();
  s.fit_grid(larger(2 / (1 + side.tau) * s.top(side), s.top(summed)));
  s.split_all(s.rows, false), s.split_all(s.cols, false);
  for (int64_t i = 0; i < summed.padded; ++i) summed.next[i] = summed.log_scaling[i] + summed.log_weight[i];
  const double undamped = 1 / side.tau;
  for (int64_t i = 0; i < side.padded; ++i) side.next[i] = i < side.count ? s.on_grid(side.potential(i, s.eps) * undamped) : T(0);
}
// soft from sums that are in its place: the terms were lowered by what is in side.sum.
template <class T> void end_log_sums(const State<T>& s, Side<T>& side) {
  for (int64_t i = side.count; i < side.padded; ++i) side.soft[i] = 1;
  for (int64_t i = 0; i < side.padded; i += LANES<double>)
    store<double>(side.soft + i, vlog<double>(load<double>(side.soft + i)));
  const double inv_eps = 1 / s.eps;
  for (int64_t i = 0; i < side.count; ++i) side.soft[i] += double(side.sum[i]) - double(side.next[i]) * inv_eps;
}
template <class T> bool fits(T low, T high) { return low >= Traits<T>::SUM_LOW && high <= Traits<T>::SUM_HIGH; }
template <class T> constexpr T LOWEST = T(-1e30);  // stands for -inf where a difference is taken

template <class T> inline Vec<T> log_term(const State<T>& s, Vec<T> base, Vec<T> potential, Vec<T> cost, Vec<T> offset) {
  return ((base + potential) - cost) * splat<T>(s.inv_eps) + offset;
}

// Calls body(k, term) for the terms of row i, vector k of a panel.
template <class T, class Body> inline void for_row_terms(const State<T>& s, int64_t i, Body&& body) {
  constexpr int W = PANEL<T>, VL = LANES<T>;
  const T *g = s.cols.reference, *offset = s.cols.next;
  const Vec<T> base = splat<T>(s.rows.next[i]);
  for (int64_t p = 0; p < s.panels; ++p) {
    const T* cost = s.C + (p * s.n + i) * W;
#pragma GCC unroll 4
    for (int k = 0; k < PANEL_VECTORS; ++k) {
      const int64_t j = p * W + k * VL;
      body(k, log_term<T>(s, base, load<T>(g + j), load<T>(cost + k * VL), load<T>(offset + j)));
    }
  }
}
// soft_i = log sum_j b_j exp((g_j + epsilon lv_j - C_ij) / epsilon)
template <class T> void log_rows(State<T>& s) {
  constexpr int NV = PANEL_VECTORS;
  Side<T>& side = s.rows;
  begin_log_sums(s, side, s.cols);
  const Chunks chunks = Chunks::of(s.n, s.m);
  for_chunks(s.team, chunks.count, [&](int64_t chunk) {
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      Vec<T> sum[NV] = {};
      for_row_terms(s, i, [&](int k, Vec<T> term) { sum[k] += vexp<T>(term); });
      T total = sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3])), peak = 0;
      if (!fits<T>(total, total)) {
        Vec<T> top = splat<T>(LOWEST<T>), again{};
        for_row_terms(s, i, [&](int, Vec<T> term) { top = vmax<T>(term, top); });
        peak = max_lanes<T>(top);
        for_row_terms(s, i, [&](int, Vec<T> term) { again += vexp<T>(term - splat<T>(peak)); });
        total = sum_lanes<T>(again);
        if (!(total > 0)) total = 1, peak = -T(__builtin_inf());  // T cannot hold the exponents
      }
      side.soft[i] = double(total), side.sum[i] = peak;
    }
  });
  end_log_sums(s, side);
}

// Calls body(k, term) for the terms of rows [first, last), vector k of panel p.
template <class T, class Body> inline void for_panel_terms(const State<T>& s, int64_t p, int64_t first, int64_t last, Body&& body) {
  constexpr int W = PANEL<T>, VL = LANES<T>;
  const T *f = s.rows.reference, *offset = s.rows.next, *base = s.cols.next + p * W;
  for (int64_t i = first; i < last; ++i) {
    const T* cost = s.C + (p * s.n + i) * W;
    const Vec<T> fi = splat<T>(f[i]), shift = splat<T>(offset[i]);
#pragma GCC unroll 4
    for (int k = 0; k < PANEL_VECTORS; ++k)
      body(k, log_term<T>(s, load<T>(base + k * VL), fi, load<T>(cost + k * VL), shift));
  }
}
// soft_j = log sum_i a_i exp((f_i + epsilon lu_i - C_ij) / epsilon)
template <class T> void log_cols(State<T>& s) {
  constexpr int W = PANEL<T>, VL = LANES<T>, NV = PANEL_VECTORS;
  Side<T>& side = s.cols;
  begin_log_sums(s, side, s.rows);
  for_chunks(s.team, s.chunks.count, [&](int64_t chunk) {
    for (int64_t p = s.chunks.begin(chunk); p < s.chunks.end(chunk); ++p) {
      Vec<T> peak[NV] = {}, sum[NV];
      const auto add = [&] {
        for (int k = 0; k < NV; ++k) sum[k] = load<T>(side.pad + p * W + k * VL);
        for (int64_t first = 0; first < s.n; first += BLOCK) {  // the rounding of one long chain of additions would show
          Vec<T> block[NV] = {};
          for_panel_terms(s, p, first, first + BLOCK < s.n ? first + BLOCK : s.n,
                          [&](int k, Vec<T> term) { block[k] += vexp<T>(term - peak[k]); });
          for (int k = 0; k < NV; ++k) sum[k] += block[k];
        }
      };
      add();
      const Vec<T> low = vmin<T>(vmin<T>(sum[0], sum[1]), vmin<T>(sum[2], sum[3]));
      const Vec<T> high = vmax<T>(vmax<T>(sum[0], sum[1]), vmax<T>(sum[2], sum[3]));
      if (!fits<T>(min_lanes<T>(low), max_lanes<T>(high))) {
        for (int k = 0; k < NV; ++k) peak[k] = splat<T>(LOWEST<T>);
        for_panel_terms(s, p, 0, s.n, [&](int k, Vec<T> term) { peak[k] = vmax<T>(term, peak[k]); });
        add();
        for (int k = 0; k < NV; ++k) {
          const auto sound = sum[k] > 0;
          peak[k] = sound ? peak[k] : splat<T>(-T(__builtin_inf())), sum[k] = sound ? sum[k] : splat<T>(T(1));
        }
      }
      for (int k = 0; k < NV; ++k) {
        store<T>(side.sum + p * W + k * VL, peak[k]);
        for (int lane = 0; lane < VL; ++lane) side.soft[p * W + k * VL + lane] = double(sum[k][lane]);
      }
    }
  });
  end_log_sums(s, side);
}

// Potentials from the log-sums, -epsilon tau soft. Returns the largest change in units of epsilon.
template <class T> double set_from_soft(State<T>& s, Side<T>& side) {
  double moved = 0;
  bool sound = true;
  for (int64_t i = 0; i < side.count; ++i) {
    const double before = side.potential(i, s.eps), after = -s.eps * side.tau * side.soft[i];
    moved = larger(magnitude(after - before), moved);
    sound = sound && finite(T(after));
    s.split(side, i, after, after);
  }
  s.sound = s.sound && sound;
  return moved / s.eps;
}

}  // namespace
