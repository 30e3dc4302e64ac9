// The kernel of two point clouds times a matrix, entry by entry computed, used and forgotten.
#pragma once
#include "points_tile.h"

namespace {

// out = (K * <L_i, R_j>) right for one problem, K_ij = exp(row_i + col_j - cost_ij / epsilon).
template <class T> struct PointProduct {
  using P = Powers<T>;
  static constexpr int W = PANEL<T>, VL = LANES<T>, NV = PANEL_VECTORS;
  static constexpr int64_t GROUP = 16 * POINT_ROWS;  // rows that use a panel while it is in the first-level cache
  // Up to this many columns of the result are summed lane by lane: a vector of them would be mostly padding.
  static constexpr int64_t FEW = VL / 2;

  Cloud<T> rows, cols, left, right_factor;
  int64_t n, m, width, padded_width;
  T *row, *col;  // exponents, in powers of two
  T* right;      // [m, padded_width], or [panels, width, W] if there are few columns
  T slope;
  Pieces pieces;

  bool few() const { return width <= FEW; }
  int64_t group_width() const { return few() ? width * VL : padded_width; }
  void layout(Arena& arena, const PointsProductTask<T>& task) {
    n = task.rows, m = task.cols, width = task.width, padded_width = round_up(width, VL);
    rows = {n, task.dim, nullptr, nullptr}, cols = {m, task.dim, nullptr, nullptr};
    left = {n, task.factors, nullptr, nullptr}, right_factor = {m, task.factors, nullptr, nullptr};
    const int64_t padded_m = round_up(m, W);
    row = arena.take<T>(n + POINT_ROWS), col = arena.take<T>(padded_m);
    right = arena.take<T>(padded_m * (few() ? width : padded_width));
    cols.panels = arena.take<T>(padded_m * task.dim), right_factor.panels = arena.take<T>(padded_m * task.factors);
    pieces.layout(arena, task.threads, (GROUP * group_width() + POINT_ROWS * W) * int64_t(sizeof(T)));
  }

  // Exponents of one side. False if one is not finite, a point's coordinates included; it is NaN then.
  static bool exponents(const Cloud<T>& cloud, const T* given, double rate, bool squared, double norm, T* to) {
    bool sound = true;
    for (int64_t i = 0; i < cloud.count; ++i) {
      double length = 0;
      for (int64_t d = 0; d < cloud.dim; ++d) length += double(cloud.points[i * cloud.dim + d]) * double(cloud.points[i * cloud.dim + d]);
      to[i] = T(double(given[i]) / LN2 - rate * (squared ? length : norm));
      if (!finite(to[i]) || !finite(length)) to[i] = T(__builtin_nan("")), sound = false;
    }
    return sound;
  }

  void run(const PointsProductTask<T>& task, int64_t p, Team* team) {
    rows.points = task.x + p * n * task.dim, cols.points = task.y + p * m * task.dim;
    T* out = task.out + p * n * width;
    const double rate = 1 / (task.epsilon[p] * LN2);
    slope = T(rate * (task.squared ? 2.0 : 1.0));
    memset(row, 0, size_t(n + POINT_ROWS) * sizeof(T)), memset(col, 0, size_t(round_up(m, W)) * sizeof(T));
    exponents(rows, task.row + p * n, rate, task.squared, 1.0, row);
    const bool sound = exponents(cols, task.col + p * m, rate, task.squared, 0.0, col) && finite(slope);
    if (!sound) {
      for (int64_t i = 0; i < n * width; ++i) out[i] = T(__builtin_nan(""));
      return;
    }
    cols.pack();
    pack_right(task.right + p * m * width);
    if (task.left) {
      left.points = task.left + p * n * task.factors, right_factor.points = task.right_factor + p * m * task.factors;
      right_factor.pack();
    }
    pieces.begin();
    const int64_t groups = (n + GROUP - 1) / GROUP;
    const int64_t step = units_per_chunk(groups, GROUP * m, task.dim + task.factors + width, int64_t(1) << 30);
    for_chunks(team, (groups + step - 1) / step, [&](int64_t chunk) {
      const int piece = pieces.take();
      T *sums = pieces.template at<T>(piece), *K = sums + GROUP * group_width();
      for (int64_t g = chunk * step; g < groups && g < (chunk + 1) * step; ++g) {
        const int64_t first = g * GROUP, last = first + GROUP < n ? first + GROUP : n;
        memset(sums, 0, size_t(GROUP * group_width()) * sizeof(T));
        for (int64_t q = 0; q < cols.n_panels(); ++q)
          for (int64_t i = first; i < last; i += POINT_ROWS) {
            kernels(i, q, task.left != nullptr, K);
            if (few()) add_few(K, q, sums + (i - first) * group_width());
            else add_products(K, q, sums + (i - first) * group_width());
          }
        for (int64_t i = first; i < last; ++i) write_row(i, sums + (i - first) * group_width(), out + i * width);
      }
      pieces.give(piece);
    });
  }

  void pack_right(const T* from) {
    const int64_t padded_m = round_up(m, W), stride = few() ? width : padded_width;
    memset(right, 0, size_t(padded_m * stride) * sizeof(T));
    for (int64_t j = 0; j < m; ++j)
      for (int64_t e = 0; e < width; ++e)
        right[few() ? (j / W * width + e) * W + j % W : j * padded_width + e] = from[j * width + e];
  }

  // K [POINT_ROWS, W] of one block of rows and panel.
  void kernels(int64_t i, int64_t q, bool coupled, T* K) const {
    const T *block[POINT_ROWS], *factor[POINT_ROWS] = {};
    rows.block(i, block);
    if (coupled) left.block(i, factor);
#pragma GCC unroll 4
    for (int v = 0; v < NV; v += 2) {
      Block<T, 2> tile;
      tile.multiply(block, cols.panel(q) + v * VL, W, rows.dim);
      for (int k = 0; k < 2; ++k) {
        const Vec<T> c = load<T>(col + q * W + (v + k) * VL);
#pragma GCC unroll 3
        for (int r = 0; r < POINT_ROWS; r += STEP) {
          Vec<T> e[STEP];
#pragma GCC unroll 6
          for (int s = 0; s < STEP; ++s) e[s] = tile.at[r + s][k] * splat<T>(slope) + (splat<T>(row[i + r + s]) + c);
          powers_of_two<T, STEP>(e, P::PRODUCT_LOWEST, P::PRODUCT_HIGHEST);
#pragma GCC unroll 6
          for (int s = 0; s < STEP; ++s) store<T>(K + (r + s) * W + (v + k) * VL, e[s]);
        }
      }
      if (!coupled) continue;
      tile.multiply(factor, right_factor.panel(q) + v * VL, W, left.dim);
      for (int k = 0; k < 2; ++k)
#pragma GCC unroll 6
        for (int r = 0; r < POINT_ROWS; ++r) {
          T* at = K + r * W + (v + k) * VL;
          store<T>(at, load<T>(at) * tile.at[r][k]);
        }
    }
  }
  template <int VECTORS> void add_block(const T* const* block, int64_t q, int64_t e, T* sums) const {
    Block<T, VECTORS> product;
    product.multiply(block, right + q * W * padded_width + e, padded_width, W);
#pragma GCC unroll 6
    for (int r = 0; r < POINT_ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        T* at = sums + r * padded_width + e + v * VL;
        store<T>(at, load<T>(at) + product.at[r][v]);
      }
  }
  void add_products(const T* K, int64_t q, T* sums) const {
    const T* block[POINT_ROWS];
    for (int r = 0; r < POINT_ROWS; ++r) block[r] = K + r * W;
    int64_t e = 0;
    for (; e + 2 * VL <= padded_width; e += 2 * VL) add_block<2>(block, q, e, sums);
    if (e < padded_width) add_block<1>(block, q, e, sums);
  }
  void add_few(const T* K, int64_t q, T* sums) const {
    for (int64_t e = 0; e < width; ++e) {
      const T* factor = right + (q * width + e) * W;
      for (int r = 0; r < POINT_ROWS; ++r) {
        Vec<T> sum{};
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum += load<T>(K + r * W + v * VL) * load<T>(factor + v * VL);
        T* at = sums + (r * width + e) * VL;
        store<T>(at, load<T>(at) + sum);
      }
    }
  }
  void write_row(int64_t i, const T* sums, T* out) const {
    const bool sound = finite(row[i]);
    for (int64_t e = 0; e < width; ++e) {
      const T sum = few() ? sum_lanes<T>(load<T>(sums + e * VL)) : sums[e];
      out[e] = sound ? sum : T(__builtin_nan(""));
    }
  }
};

template <class T> size_t points_product_scratch_of(const PointsProductTask<T>& task) {
  Arena count{nullptr};
  PointProduct<T> product;
  product.layout(count, task);
  return count.used;
}
template <class T> void points_product_one(const PointsProductTask<T>& task, int64_t p, char* memory, Team* team) {
  Arena arena{memory};
  PointProduct<T> product;
  product.layout(arena, task);
  product.run(task, p, team);
}

}  // namespace
