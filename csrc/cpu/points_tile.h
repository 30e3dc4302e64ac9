// Tiles of the kernel of two point clouds, whose cost is never stored: blocks of POINT_ROWS rows by a pair of vectors.
//
// cost_ij = h_i + k_j - scale <x_i, y_j>, so that in powers of two
//     K_ij = exp((f_i + g_j - cost_ij) / epsilon) = 2^(slope <x_i, y_j> + row_i + col_j),
// slope = scale / (epsilon ln 2), row_i = (f_i - h_i) / (epsilon ln 2), col_j = (g_j - k_j) / (epsilon ln 2).
#pragma once
#include "state.h"
#include "team.h"

namespace {
using namespace pk;

constexpr int POINT_ROWS = 6;  // with two vectors a row: 12 sums, 2 columns and a broadcast fill 16 registers
constexpr int STEP = 3;        // vectors whose exponentials are computed in step
constexpr double LN2 = 0.69314718055994530942;

// Powers of two: near-minimax polynomials of 2^x on [-1/2, 1/2], and the range of a kernel's logarithm. What is smaller than
// 2^LOWEST counts as that; its product with a weight is still a normal number.
template <class T> struct Powers;
template <> struct Powers<float> {
  static constexpr int TERMS = 6;
  static constexpr float COEFFICIENT[TERMS + 1] = {1.0f,           0.693147207f,   0.240226509f,  0.0555032723f,
                                                   0.00961805668f, 0.00134004282f, 0.000154614447f};
  static constexpr float LOWEST = -90, HIGHEST = 126, PRODUCT_LOWEST = -122, PRODUCT_HIGHEST = 115;
};
template <> struct Powers<double> {
  static constexpr int TERMS = 11;
  static constexpr double COEFFICIENT[TERMS + 1] = {
      1.0, 0.693147180559945309, 0.240226506959101596, 0.055504108664821627, 0.00961812910758725667, 0.00133335581464064707,
      0.000154035304637243542, 0.0000152527338415567726, 1.32154325359123762e-6, 1.01780570877339411e-7, 7.07419429728852101e-9,
      4.45581790833606449e-10};
  static constexpr double LOWEST = -900, HIGHEST = 1020, PRODUCT_LOWEST = -1017, PRODUCT_HIGHEST = 1010;
};

// x <- 2^x, in [2^low, 2^high], NaN excluded. Several vectors in step: one alone would wait for each of its operations.
template <class T, int COUNT> inline void powers_of_two(Vec<T>* x, T low, T high) {
  using P = Powers<T>;
  const Vec<T> l = splat<T>(low), h = splat<T>(high), magic = splat<T>(Traits<T>::MAGIC);
  Vec<T> shifted[COUNT], p[COUNT];
#pragma GCC unroll 6
  for (int k = 0; k < COUNT; ++k) x[k] = x[k] > l ? x[k] : l;
#pragma GCC unroll 6
  for (int k = 0; k < COUNT; ++k) x[k] = x[k] < h ? x[k] : h;
#pragma GCC unroll 6
  for (int k = 0; k < COUNT; ++k) shifted[k] = x[k] + magic;
#pragma GCC unroll 6
  for (int k = 0; k < COUNT; ++k) x[k] -= shifted[k] - magic;
#pragma GCC unroll 6
  for (int k = 0; k < COUNT; ++k) p[k] = x[k] * splat<T>(P::COEFFICIENT[P::TERMS]) + splat<T>(P::COEFFICIENT[P::TERMS - 1]);
#pragma GCC unroll 16
  for (int term = P::TERMS - 2; term >= 0; --term)
#pragma GCC unroll 6
    for (int k = 0; k < COUNT; ++k) p[k] = p[k] * x[k] + splat<T>(P::COEFFICIENT[term]);
#pragma GCC unroll 6
  for (int k = 0; k < COUNT; ++k) x[k] = (Vec<T>)((Int<T>)p[k] + ((Int<T>)shifted[k] << Traits<T>::MANTISSA));
}

// A cloud of points, as rows that are broadcast and, once packed, as panels of columns.
template <class T> struct Cloud {
  int64_t count, dim;
  const T* points;  // [count, dim]
  T* panels;        // [panels, dim, PANEL], zeros behind the last point

  int64_t n_panels() const { return round_up(count, PANEL<T>) / PANEL<T>; }
  const T* panel(int64_t p) const { return panels + p * dim * PANEL<T>; }
  void block(int64_t first, const T** rows) const {  // rows behind the last one repeat it
    for (int r = 0; r < POINT_ROWS; ++r) rows[r] = points + larger<int64_t>(0, (first + r < count ? first + r : count - 1)) * dim;
  }
  void pack() {
    for (int64_t p = 0; p < n_panels(); ++p) {
      T* to = panels + p * dim * PANEL<T>;
      for (int k = 0; k < PANEL<T>; ++k) {
        const int64_t j = p * PANEL<T> + k;
        for (int64_t d = 0; d < dim; ++d) to[d * PANEL<T> + k] = j < count ? points[j * dim + d] : T(0);
      }
    }
  }
};

// at[r][v] = sum_d rows[r][d] * cols[d * stride + v * LANES ...]
template <class T, int VECTORS> struct Block {
  Vec<T> at[POINT_ROWS][VECTORS];

  // Not inlined: GCC spills the sums where code around them wants registers too.
  __attribute__((noinline)) void multiply(const T* const* rows, const T* cols, int64_t stride, int64_t dim) {
    const T *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3], *r4 = rows[4], *r5 = rows[5];
    Vec<T> sum[POINT_ROWS][VECTORS] = {};
    for (int64_t d = 0; d < dim; ++d, cols += stride) {
      Vec<T> col[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        col[v] = load<T>(cols + v * LANES<T>);
        hold(col[v]);
      }
      const T row[POINT_ROWS] = {r0[d], r1[d], r2[d], r3[d], r4[d], r5[d]};
#pragma GCC unroll 6
      for (int r = 0; r < POINT_ROWS; ++r) {
        const Vec<T> x = splat<T>(row[r]);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sum[r][v] += x * col[v];
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < POINT_ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) at[r][v] = sum[r][v];
  }
};
static_assert(PANEL_VECTORS % 2 == 0 && POINT_ROWS == 6);

// Memory of the threads that work on one problem: a piece is taken for a chunk and given back. There are as many pieces as
// threads, and which one a chunk gets does not show in its results.
struct Pieces {
  char* memory;
  int32_t* busy;
  int64_t bytes;  // of one piece
  int count;

  void layout(Arena& arena, int threads, int64_t piece_bytes) {
    count = threads, bytes = round_up(piece_bytes, 64);
    busy = arena.take<int32_t>(threads), memory = arena.take<char>(bytes * threads);
  }
  void begin() { memset(busy, 0, size_t(count) * sizeof(int32_t)); }
  int take() const {
    for (int k = 0;; k = k + 1 < count ? k + 1 : 0)
      if (!__atomic_exchange_n(busy + k, 1, __ATOMIC_ACQUIRE)) return k;
  }
  void give(int k) const { __atomic_store_n(busy + k, 0, __ATOMIC_RELEASE); }
  template <class X> X* at(int k) const { return reinterpret_cast<X*>(memory + k * bytes); }
};

// Work of about an exponential and `dim` products an entry, cut by sizes alone: how many of `units` (panels or blocks of rows,
// each `entries` large) make a chunk worth a thread's while.
inline int64_t units_per_chunk(int64_t units, int64_t entries, int64_t dim, int64_t most_chunks) {
  const int64_t worth = 1 << 20, each = larger<int64_t>(1, entries * (dim + 16));
  return larger<int64_t>(larger<int64_t>(1, worth / each), (units + most_chunks - 1) / most_chunks);
}

}  // namespace
