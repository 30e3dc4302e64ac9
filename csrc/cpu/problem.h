// What the kernels of one problem share: which rows and columns exist, the range of a cost, its way into the panels.
#pragma once
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
    Lanes lanes{splat<T>(low), splat<T>(high), {}};
    int64_t j = 0;
    for (; j + LANES<T> <= count; j += LANES<T>) lanes.see(load_any<T>(x + j));
    add(lanes);
    T rest = 0;
    for (; j < count; ++j) {
      low = x[j] < low ? x[j] : low, high = x[j] > high ? x[j] : high;
      rest += x[j] - x[j];
    }
    finite = finite && rest == 0;
  }
  void join(const Range& other) {
    low = other.low < low ? other.low : low, high = other.high > high ? other.high : high;
    finite = finite && other.finite;
  }

  struct Lanes {
    Vec<T> low, high, zero;
    void see(Vec<T> v) {
      low = vmin<T>(v, low), high = vmax<T>(v, high);
      zero += v - v;  // NaN as soon as one entry is not finite
    }
  };
  void add(const Lanes& lanes) {
    low = min_lanes<T>(lanes.low), high = max_lanes<T>(lanes.high);
    finite = finite && sum_lanes<T>(lanes.zero) == 0;
  }
};

// Copy the entries of a row that exist into the panels as row i, and see their range; padding is inf. cols: their places, or
// null for all of them.
template <class T> void put_row(Solver<T>& s, int64_t i, const T* row, const int32_t* cols, Range<T>& range) {
  constexpr int W = PANEL<T>;
  typename Range<T>::Lanes lanes{splat<T>(range.low), splat<T>(range.high), {}};
  const int64_t whole = s.m / W;
  T* to = s.C + i * W;
  for (int64_t p = 0; p < whole; ++p, to += s.n * W) {
    const T* from = row + p * W;
    if (cols != nullptr) {
      for (int64_t k = 0; k < W; ++k) to[k] = row[cols[p * W + k]];
      from = to;
    }
#pragma GCC unroll 4
    for (int k = 0; k < W; k += LANES<T>) {
      const Vec<T> v = load_any<T>(from + k);
      store<T>(to + k, v), lanes.see(v);
    }
  }
  range.add(lanes);
  if (whole == s.panels) return;
  const int64_t rest = s.m - whole * W;
  for (int64_t k = 0; k < W; ++k) {
    const int64_t j = whole * W + k;
    to[k] = k < rest ? row[cols ? cols[j] : j] : T(__builtin_inf());
  }
  range.see(to, rest);
}
template <class T> void put_row(Solver<T>& s, int64_t i, const T* row) {
  Range<T> unused;
  put_row(s, i, row, nullptr, unused);
}

template <class T> inline T sign(T x) { return x > 0 ? T(1) : x < 0 ? T(-1) : x; }  // NaN stays NaN
template <class T> void fill(T* x, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) x[i] = value;
}

}  // namespace
