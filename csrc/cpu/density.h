// One solved problem, row by row: exponents (f_i + g_j - C_ij) / epsilon and densities exp of them, over the rows and
// columns that exist, in aligned and padded arrays of W.
#pragma once
#include "problem.h"
#include "team.h"

namespace {

template <class T> constexpr T DENSITY_CEILING = T(40);  // exponents where the density is multiplied by a weight of zero

// from[index[0..count)], or from[0..count) without an index.
template <class W, class T> void gather_values(W* to, const T* from, const int32_t* index, int64_t count) {
  if (index != nullptr) {
    for (int64_t k = 0; k < count; ++k) to[k] = W(from[index[k]]);
  } else if constexpr (sizeof(W) == sizeof(T)) {
    memcpy(to, from, size_t(count) * sizeof(T));
  } else {
    for (int64_t k = 0; k < count; ++k) to[k] = W(from[k]);
  }
}
template <class T, class W> void scatter_values(T* to, const W* from, const int32_t* index, int64_t count) {
  if (index != nullptr) {
    for (int64_t k = 0; k < count; ++k) to[index[k]] = T(from[k]);
  } else if constexpr (sizeof(W) == sizeof(T)) {
    memcpy(to, from, size_t(count) * sizeof(T));
  } else {
    for (int64_t k = 0; k < count; ++k) to[k] = T(from[k]);
  }
}

// Largest of two, NaN if x is.
template <class W> inline Vec<W> at_least(Vec<W> low, Vec<W> x) { return select<W>((Int<W>)(low > x), low, x); }
template <class W> inline Vec<W> at_most(Vec<W> high, Vec<W> x) { return select<W>((Int<W>)(high < x), high, x); }

// vexp for exponents that may be NaN (result NaN) or too large (result inf).
template <class W> inline Vec<W> density(Vec<W> x) {
  const Int<W> usual = (Int<W>)(x <= splat<W>(Traits<W>::EXP_HIGH));
  return select<W>(usual, vexp<W>(x), x + splat<W>(W(__builtin_inf())));
}

template <class W> W dot(const W* x, const W* y, int64_t padded) {
  constexpr int VL = LANES<W>;
  Vec<W> sums[2] = {};
  int64_t j = 0;
  for (; j + 2 * VL <= padded; j += 2 * VL) {
    sums[0] += load<W>(x + j) * load<W>(y + j);
    sums[1] += load<W>(x + j + VL) * load<W>(y + j + VL);
  }
  if (j < padded) sums[0] += load<W>(x + j) * load<W>(y + j);
  return sum_lanes<W>(sums[0] + sums[1]);
}

// A long problem is cut into chunks of rows. Their number follows from the sizes alone; partial sums over rows are added
// in the order of the chunks.
struct RowParts {
  static constexpr int64_t MOST = 16, ELEMENTS = 32768;
  int64_t rows, count;
  RowParts(int64_t n, int64_t m) : rows(n), count(n * m / ELEMENTS) {
    count = count > MOST ? MOST : count;
    count = count > rows ? rows : count;
    count = count < 1 ? 1 : count;
  }
  int64_t begin(int64_t chunk) const { return rows * chunk / count; }
};

template <class T, class W> struct Density {
  int64_t n, m, padded, stride;
  int32_t *row_index, *col_index;  // col_index is null when every column exists
  const T* cost;
  W *f, *g, *a, *b;                // padding of g is -inf: a density of 0
  W *ceiling, *low_ceiling;        // of the exponents of a row with and without weight
  bool bounded;                    // some column has no weight
  double eps, total_a, total_b;
  W inv_eps, correction;           // 1 / epsilon = inv_eps (1 + correction)

  void layout(Arena& arena, int64_t rows, int64_t cols) {
    padded = round_up(cols, LANES<W>);
    row_index = arena.take<int32_t>(rows), col_index = arena.take<int32_t>(cols);
    f = arena.take<W>(rows), a = arena.take<W>(rows);
    g = arena.take<W>(padded), b = arena.take<W>(padded);
    ceiling = arena.take<W>(padded), low_ceiling = arena.take<W>(padded);
  }
  // Gather problem p. The potentials may be null.
  void begin(const Solved<T>& problem, int64_t p) {
    const int64_t N = problem.rows, M = problem.cols;
    n = gather(problem.row_mask ? problem.row_mask + p * N : nullptr, N, row_index);
    m = gather(problem.col_mask ? problem.col_mask + p * M : nullptr, M, col_index);
    if (m == M) col_index = nullptr;
    padded = round_up(m, LANES<W>), stride = M;
    cost = problem.cost + p * N * M;
    if (problem.f) gather_values(f, problem.f + p * N, row_index, n);
    if (problem.g) gather_values(g, problem.g + p * M, col_index, m);
    gather_values(a, problem.a + p * N, row_index, n);
    gather_values(b, problem.b + p * M, col_index, m);
    total_a = total_b = 0, bounded = false;
    for (int64_t i = 0; i < n; ++i) total_a += double(a[i]);
    for (int64_t j = 0; j < padded; ++j) {
      if (j >= m) b[j] = 0, g[j] = -W(__builtin_inf());
      else total_b += double(b[j]), bounded = bounded || b[j] == 0;
      ceiling[j] = b[j] == 0 ? DENSITY_CEILING<W> : W(__builtin_inf()), low_ceiling[j] = DENSITY_CEILING<W>;
    }
    eps = problem.epsilon[p];
    inv_eps = W(1 / eps), correction = W((1 - eps * double(inv_eps)) / (eps * double(inv_eps)));
  }
  bool alive() const { return total_a > 0 && total_b > 0; }

  void read_cost(int64_t i, W* row) const {
    gather_values(row, cost + row_index[i] * stride, col_index, m);
    for (int64_t j = m; j < padded; ++j) row[j] = 0;
  }
  // Write a row of results where the columns exist; the caller has cleared the others.
  void write(T* matrix, int64_t i, const W* row) const {
    scatter_values(matrix + row_index[i] * stride, row, col_index, m);
  }
  Vec<W> exponent(W fi, int64_t j, const W* row) const {
    const Vec<W> x = ((splat<W>(fi) + load<W>(g + j)) - load<W>(row + j)) * splat<W>(inv_eps);
    const Vec<W> kept = at_least<W>(splat<W>(2 * Traits<W>::EXP_LOW), x);  // -inf times the correction would be NaN
    return kept + kept * splat<W>(correction);
  }
  // visit(j, exponent) for the vectors of row i, whose cost is in `row`.
  template <class Visit> void each_exponent(int64_t i, const W* row, Visit&& visit) const {
    const W fi = f[i];
    if (a[i] > 0 && !bounded) {
      for (int64_t j = 0; j < padded; j += LANES<W>) visit(j, exponent(fi, j, row));
      return;
    }
    const W* high = a[i] > 0 ? ceiling : low_ceiling;
    for (int64_t j = 0; j < padded; j += LANES<W>) visit(j, at_most<W>(load<W>(high + j), exponent(fi, j, row)));
  }
  // visit(j, exponent, density)
  template <class Visit> void each(int64_t i, const W* row, Visit&& visit) const {
    each_exponent(i, row, [&](int64_t j, Vec<W> x) { visit(j, x, density<W>(x)); });
  }
};

// Clear a result of [N, M] before only the entries that exist are written.
template <class T> void clear_unless_whole(T* matrix, int64_t N, int64_t M, int64_t n, int64_t m) {
  if (n < N || m < M) memset(matrix, 0, size_t(N * M) * sizeof(T));
}

}  // namespace
