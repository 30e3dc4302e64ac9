// The kernel matrix K and its products with the scalings: a pass without exponentials, and the pass that builds K.
#pragma once
#include "state.h"

namespace {

template <class T> void clear_lanes(State<T>& s) { memset(s.lanes, 0, size_t(s.n) * sizeof(Vec<T>)); }
template <class T> void reduce_lanes(State<T>& s) {
  for (int64_t i = 0; i < s.n; ++i) s.rows.sum[i] = sum_lanes<T>(load<T>(s.lanes + i * LANES<T>));
}

// Build K and the row sums from the references and scalings. False if a scaling is out of range or K overflows.
template <class T> bool build_kernel(State<T>& s) {
  constexpr int W = PANEL<T>, VL = LANES<T>;
  const bool rows_fit = s.rows.begin_scaling(s.eps), cols_fit = s.cols.begin_scaling(s.eps);
  clear_lanes(s);
  const Vec<T> scale = splat<T>(s.inv_eps);
  Vec<T> top{};
  for (int64_t p = 0; p < s.panels; ++p) {
    const T *cp = s.C + p * s.n * W, *gp = s.cols.reference + p * W, *vp = s.cols.scaled_weight + p * W;
    T* kp = s.K + p * s.n * W;
    for (int64_t i = 0; i < s.n; ++i) {
      const Vec<T> fi = splat<T>(s.rows.reference[i]);
      Vec<T> sum{};
      for (int k = 0; k < W; k += VL) {
        const Vec<T> exponent = ((fi + load<T>(gp + k)) - load<T>(cp + i * W + k)) * scale, e = vexp<T>(exponent);
        store<T>(kp + i * W + k, e);
        top = vmax<T>(exponent, top), sum += e * load<T>(vp + k);
      }
      store<T>(s.lanes + i * VL, load<T>(s.lanes + i * VL) + sum);
    }
  }
  reduce_lanes(s);
  return rows_fit && cols_fit && max_lanes<T>(top) <= Traits<T>::EXP_HIGH;
}

// Choose references near the potentials and build K. False as above.
template <class T> bool absorb(State<T>& s) {
  s.fit_grid(larger(s.top(s.rows), s.top(s.cols)));
  s.split_all(s.rows, true), s.split_all(s.cols, true);
  return build_kernel(s);
}

constexpr int64_t BLOCK = 64;  // rows of a column sum that are added in one chain

// Sums over the rows of one panel, in blocks: the rounding of one long chain of additions would show.
template <class T> void panel_col_sums(State<T>& s, int64_t p) {
  constexpr int W = PANEL<T>, VL = LANES<T>, NV = PANEL_VECTORS;
  const T *kp = s.K + p * s.n * W, *ua = s.rows.scaled_weight;
  T* sum = s.cols.sum + p * W;
  for (int64_t first = 0; first < s.n; first += BLOCK) {
    const int64_t last = first + BLOCK < s.n ? first + BLOCK : s.n;
    Vec<T> even[NV] = {}, odd[NV] = {};  // two chains hide the latency of the additions
    int64_t i = first;
    for (; i + 2 <= last; i += 2) {
      const Vec<T> u0 = splat<T>(ua[i]), u1 = splat<T>(ua[i + 1]);
#pragma GCC unroll 4
      for (int k = 0; k < NV; ++k) even[k] += u0 * load<T>(kp + i * W + k * VL);
#pragma GCC unroll 4
      for (int k = 0; k < NV; ++k) odd[k] += u1 * load<T>(kp + (i + 1) * W + k * VL);
    }
    if (i < last)
      for (int k = 0; k < NV; ++k) even[k] += splat<T>(ua[i]) * load<T>(kp + i * W + k * VL);
    for (int k = 0; k < NV; ++k) {
      const Vec<T> block = even[k] + odd[k];
      store<T>(sum + k * VL, first > 0 ? load<T>(sum + k * VL) + block : block);
    }
  }
}

template <class T> void panel_row_sums(State<T>& s, int64_t p) {
  constexpr int W = PANEL<T>, VL = LANES<T>;
  static_assert(PANEL_VECTORS == 4);
  const T *kp = s.K + p * s.n * W, *vp = s.cols.scaled_weight + p * W;
  const Vec<T> v0 = load<T>(vp), v1 = load<T>(vp + VL), v2 = load<T>(vp + 2 * VL), v3 = load<T>(vp + 3 * VL);
  for (int64_t i = 0; i < s.n; ++i) {
    const T* row = kp + i * W;
    const Vec<T> even = v0 * load<T>(row) + v2 * load<T>(row + 2 * VL);
    const Vec<T> odd = v1 * load<T>(row + VL) + v3 * load<T>(row + 3 * VL);
    store<T>(s.lanes + i * VL, load<T>(s.lanes + i * VL) + (even + odd));
  }
}

}  // namespace
