// The kernel matrix K and its products with the scalings: a pass without exponentials, and the pass that builds K.
#pragma once
#include "state.h"

namespace {

template <class T> T* lanes_of(const State<T>& s, int64_t chunk) { return s.lanes + chunk * s.rows.padded * LANES<T>; }
template <class T> void clear_lanes(const State<T>& s, int64_t chunk) {
  memset(lanes_of(s, chunk), 0, size_t(s.rows.padded) * sizeof(Vec<T>));
}
// Row sums from the lanes of all chunks, in their order.
template <class T> void reduce_lanes(State<T>& s) {
  constexpr int VL = LANES<T>;
  const int64_t count = s.rows.padded * VL;
  for (int64_t chunk = 1; chunk < s.chunks.count; ++chunk) {
    const T* more = lanes_of(s, chunk);
    for (int64_t k = 0; k < count; k += VL) store<T>(s.lanes + k, load<T>(s.lanes + k) + load<T>(more + k));
  }
  for (int64_t i = 0; i < s.rows.padded; i += VL) store<T>(s.rows.sum + i, sum_each<T>(s.lanes + i * VL));
}

// Build K and the row sums from the references and scalings. False if a scaling is out of range or K overflows.
template <class T> bool build_kernel(State<T>& s) {
  constexpr int W = PANEL<T>, VL = LANES<T>;
  const bool rows_fit = s.rows.begin_scaling(s.eps), cols_fit = s.cols.begin_scaling(s.eps);
  T tops[Chunks::MOST];
  for_chunks(s.team, s.chunks.count, [&](int64_t chunk) {
    clear_lanes(s, chunk);
    T* lanes = lanes_of(s, chunk);
    const Vec<T> scale = splat<T>(s.inv_eps);
    Vec<T> top{};
    for (int64_t p = s.chunks.begin(chunk); p < s.chunks.end(chunk); ++p) {
      const T *cp = s.C + p * s.n * W, *gp = s.cols.reference + p * W, *vp = s.cols.scaled_weight + p * W;
      T* kp = s.K + p * s.n * W;
      for (int64_t i = 0; i < s.n; ++i) {
        const Vec<T> fi = splat<T>(s.rows.reference[i]);
        Vec<T> sum{};
#pragma GCC unroll 4
        for (int k = 0; k < W; k += VL) {
          const Vec<T> exponent = ((fi + load<T>(gp + k)) - load<T>(cp + i * W + k)) * scale, e = vexp<T>(exponent);
          store<T>(kp + i * W + k, e);
          top = vmax<T>(exponent, top), sum += e * load<T>(vp + k);
        }
        store<T>(lanes + i * VL, load<T>(lanes + i * VL) + sum);
      }
    }
    tops[chunk] = max_lanes<T>(top);
  });
  reduce_lanes(s);
  bool in_range = rows_fit && cols_fit;
  for (int64_t chunk = 0; chunk < s.chunks.count; ++chunk) in_range = in_range && tops[chunk] <= Traits<T>::EXP_HIGH;
  return in_range;
}

// Choose references near the potentials and build K. False as above.
template <class T> bool absorb(State<T>& s) {
  s.settle();
  s.fit_grid(larger(s.top(s.rows), s.top(s.cols)));
  s.split_all(s.rows, true), s.split_all(s.cols, true);
  return build_kernel(s);
}

constexpr int64_t BLOCK = 64;            // rows of a column sum that are added before they go to the total
constexpr int64_t L1_BYTES = 24 * 1024;  // of K, to be read twice from the first-level cache

// Sums over the rows of `PANELS` panels side by side, in blocks: the rounding of one long chain of additions would show.
// Two panels have as many chains of additions as hide their latency, one panel has two for alternate rows.
template <class T, int PANELS> void add_down(const T* panel, int64_t n, const T* weights, T* sum) {
  constexpr int W = PANEL<T>, VL = LANES<T>, NV = PANEL_VECTORS, CHAINS = 3 - PANELS;
  constexpr int64_t rows = BLOCK / 2 * CHAINS;
  const int64_t stride = n * W;
  for (int64_t first = 0; first < n; first += rows) {
    const int64_t last = first + rows < n ? first + rows : n;
    Vec<T> chain[CHAINS][PANELS * NV] = {};
    int64_t i = first;
    for (; i + CHAINS <= last; i += CHAINS) {
#pragma GCC unroll 2
      for (int c = 0; c < CHAINS; ++c) {
        const Vec<T> w = splat<T>(weights[i + c]);
#pragma GCC unroll 8
        for (int k = 0; k < PANELS * NV; ++k)
          chain[c][k] += w * load<T>(panel + (k / NV) * stride + (i + c) * W + (k % NV) * VL);
      }
    }
    if (i < last) {
      const Vec<T> w = splat<T>(weights[i]);
#pragma GCC unroll 8
      for (int k = 0; k < PANELS * NV; ++k) chain[0][k] += w * load<T>(panel + (k / NV) * stride + i * W + (k % NV) * VL);
    }
#pragma GCC unroll 8
    for (int k = 0; k < PANELS * NV; ++k) {
      const Vec<T> block = CHAINS == 2 ? chain[0][k] + chain[CHAINS - 1][k] : chain[0][k];
      store<T>(sum + k * VL, first > 0 ? load<T>(sum + k * VL) + block : block);
    }
  }
}
// Add the row sums of `PANELS` panels side by side to the lanes. The last rows come first: they are still in the cache where
// the panels are larger than it.
template <class T, int PANELS> void add_across(const T* panel, int64_t n, const T* weights, T* lanes) {
  constexpr int W = PANEL<T>, VL = LANES<T>, NV = PANEL_VECTORS;
  static_assert(NV == 4);
  const int64_t stride = n * W;
  Vec<T> w[PANELS * NV];
#pragma GCC unroll 8
  for (int k = 0; k < PANELS * NV; ++k) w[k] = load<T>(weights + k * VL);
  for (int64_t i = n - 1; i >= 0; --i) {
    const T* row = panel + i * W;
    Vec<T> even = w[0] * load<T>(row), odd = w[1] * load<T>(row + VL);
#pragma GCC unroll 8
    for (int k = 2; k < PANELS * NV; k += 2) {
      even += w[k] * load<T>(row + (k / NV) * stride + (k % NV) * VL);
      odd += w[k + 1] * load<T>(row + (k / NV) * stride + (k % NV + 1) * VL);
    }
    store<T>(lanes + i * VL, load<T>(lanes + i * VL) + (even + odd));
  }
}
// Column sums of panels [first, last), and what they add to the row sums.
template <class T> void col_sums(const State<T>& s, int64_t first, int64_t last) {
  constexpr int W = PANEL<T>;
  int64_t p = first;
  for (; p + 2 <= last; p += 2) add_down<T, 2>(s.K + p * s.n * W, s.n, s.rows.scaled_weight, s.cols.sum + p * W);
  for (; p < last; ++p) add_down<T, 1>(s.K + p * s.n * W, s.n, s.rows.scaled_weight, s.cols.sum + p * W);
}
template <class T> void row_sums(const State<T>& s, int64_t first, int64_t last, T* lanes) {
  constexpr int W = PANEL<T>;
  int64_t p = first;
  for (; p + 2 <= last; p += 2) add_across<T, 2>(s.K + p * s.n * W, s.n, s.cols.scaled_weight + p * W, lanes);
  for (; p < last; ++p) add_across<T, 1>(s.K + p * s.n * W, s.n, s.cols.scaled_weight + p * W, lanes);
}
// Panels between the two: as many pairs as stay in the first-level cache, or one pair.
template <class T> int64_t group_of(const State<T>& s) {
  const int64_t fit = L1_BYTES / larger<int64_t>(s.n * PANEL<T> * int64_t(sizeof(T)), 1);
  return fit < 4 ? 2 : (fit > 8 ? 8 : fit / 2 * 2);
}

}  // namespace
