// Potentials of two point clouds and the passes over their kernel.
#pragma once
#include "points_tile.h"

namespace {

// Rows or columns. Entries [count, padded) are padding with weight 0.
template <class T> struct PointSide {
  Cloud<T> cloud;
  int64_t padded;
  double tau;
  double *norm, *weight, *log_weight;  // h or k; a or b
  double *potential, *next;            // with an exact mass: the cap
  double *centre;                      // the potential at which K is computed
  double *sum;                         // of K and the other side's scaled weights
  double *soft;                        // log of the weighted sums without this side's potential
  T *exponent;                         // its row_i or col_j
  T *scaled;                           // weight times exp((potential - centre) / epsilon)
  T *last;                             // minus the last log-sums in powers of two: reference of the next ones
  bool has_last;
  double total, least;                 // sum of the scaled weights, and the smallest one that is positive

  void layout(Arena& arena, int64_t count, int64_t dim) {
    cloud.count = count, cloud.dim = dim;
    padded = round_up(count + POINT_ROWS, PANEL<T>);
    double** doubles[] = {&norm, &weight, &log_weight, &potential, &next, &centre, &sum, &soft};
    for (double** piece : doubles) *piece = arena.take<double>(padded);
    T** pieces[] = {&exponent, &scaled, &last};
    for (T** piece : pieces) *piece = arena.take<T>(padded);
    cloud.panels = arena.take<T>(round_up(count, PANEL<T>) * dim);
  }
  // Weights are in weight[0..count), or their logs are set later.
  void begin(const T* points, bool squared, double damp) {
    cloud.points = points, tau = damp, has_last = false;
    cloud.pack();
    for (int64_t i = 0; i < padded; ++i) {
      const bool real = i < cloud.count;
      if (!real) weight[i] = 0;
      log_weight[i] = weight[i] > 0 ? log_of(weight[i]) : -__builtin_inf();
      norm[i] = squared ? 0 : 1, potential[i] = next[i] = centre[i] = soft[i] = 0, sum[i] = 1;
      exponent[i] = scaled[i] = last[i] = 0;
      for (int64_t d = 0; squared && real && d < cloud.dim; ++d) {
        const double x = double(points[i * cloud.dim + d]);
        norm[i] += x * x;
      }
    }
  }
};

template <class T> struct PointState {
  using P = Powers<T>;
  static constexpr int W = PANEL<T>, VL = LANES<T>, NV = PANEL_VECTORS;
  // Sums between total * 2^SUM_LOW and least * 2^SUM_HIGH, of weights that add up to `total` and are `least` or zero, contain
  // no kernel that was cut off and mattered.
  static constexpr double SUM_LOW = double(P::LOWEST) + 30, SUM_HIGH = double(P::HIGHEST) - 1;
  static constexpr int64_t ROW_CHAIN = 10;    // blocks of rows that one chain of additions goes through
  static constexpr int64_t MOST_CHUNKS = 32;  // every chunk has its own row sums

  PointSide<T> rows, cols;
  int64_t dim;
  double eps, rate;  // rate: 1 / (epsilon ln 2)
  T slope;
  double grid;  // of the exponents in one pass over both sides
  double low_sum, high_sum;  // 2^SUM_LOW, 2^SUM_HIGH
  bool sound;
  Team* team;
  Pieces pieces;
  double* partial;  // [chunks, padded rows]

  static int64_t piece_bytes(int64_t padded_rows) { return padded_rows * (W + VL) * int64_t(sizeof(T)); }
  int64_t panels_per_chunk(const PointSide<T>& over, const PointSide<T>& of) const {
    return units_per_chunk(of.cloud.n_panels(), over.cloud.count * W, dim, MOST_CHUNKS);
  }
  void layout(Arena& arena, int64_t n, int64_t m, int64_t features, int threads, bool two_sided) {
    dim = features;
    rows.layout(arena, n, dim);
    if (!two_sided) return;
    cols.layout(arena, m, dim);
    pieces.layout(arena, threads, piece_bytes(rows.padded));
    partial = arena.take<double>(larger<int64_t>(1, MOST_CHUNKS) * rows.padded);
  }
  void begin(double epsilon, double scale) {
    eps = epsilon, rate = 1 / (epsilon * LN2), slope = T(rate * scale), grid = 0;
    low_sum = __builtin_exp2(SUM_LOW), high_sum = __builtin_exp2(SUM_HIGH);
    sound = finite(T(eps)) && finite(T(rate)) && finite(slope);
  }

  // ---- grid of the exponents ------------------------------------------------------------------------------------------

  // Exponents are multiples of a grid on which the sum of two is exact: errors of the cost are then the same in every
  // iteration, and what rounds off goes into the weights. Beyond COARSEST T cannot tell neighbours apart anyway.
  static constexpr double COARSEST = 8;
  void fit_grid(double top) {
    sound = sound && finite(T(top));
    if (!sound || top <= grid * double(int64_t(1) << Traits<T>::GRID_BITS)) return;
    int exponent;
    __builtin_frexp(top, &exponent);  // top < 2^exponent
    grid = __builtin_ldexp(1.0, exponent - Traits<T>::GRID_BITS);
  }
  double on_grid(double x) const {
    const double shift = grid <= COARSEST ? 0x1.8p52 * grid : 0;  // the sum has this grid as its unit in the last place
    return (x + shift) - shift;
  }

  // ---- log-sums, right at any range -----------------------------------------------------------------------------------

  // side.soft_j = log sum_i weight_i exp((potential_i - cost_ij) / epsilon) over the other side's entries i.
  void log_sums(PointSide<T>& over, PointSide<T>& side) {
    const auto exponent = [&](int64_t i) { return rate * (over.potential[i] - over.norm[i]) + over.log_weight[i] / LN2; };
    double top = 0;
    for (int64_t i = 0; i < over.cloud.count; ++i)
      if (over.log_weight[i] > -__builtin_inf()) top = larger(magnitude(exponent(i)), top);
    fit_grid(top);
    if (!sound) return;
    for (int64_t i = 0; i < over.padded; ++i) {
      const double e = exponent(i);
      over.exponent[i] = e > -1e30 ? T(on_grid(e)) : T(-1e30), over.scaled[i] = 1;
      if (e > -1e30 && grid <= COARSEST) over.scaled[i] = T(__builtin_exp2(e - double(over.exponent[i])));
    }
    bool done = false;
    if (side.has_last) {
      sum_pass(over, side);
      done = true;
      const double low = low_sum * double(over.cloud.count);
      for (int64_t j = 0; j < side.cloud.count; ++j) done = done && side.sum[j] >= low && side.sum[j] <= high_sum;
    }
    if (!done) {
      top_pass(over, side);
      sum_pass(over, side);
    }
    double moved = 0;
    for (int64_t j = 0; j < side.padded; j += LANES<double>)
      store<double>(side.soft + j, vlog<double>(load<double>(side.sum + j)));
    for (int64_t j = 0; j < side.cloud.count; ++j) {
      const double log2_sum = side.soft[j] / LN2;
      moved = larger(magnitude(log2_sum), moved);
      const double reference = double(side.last[j]);
      side.last[j] = T(on_grid(reference - log2_sum));
      side.soft[j] = side.soft[j] - reference * LN2 - side.norm[j] / eps;
    }
    for (int64_t j = side.cloud.count; j < side.padded; ++j) side.soft[j] = 0;
    side.has_last = done ? moved < -SUM_LOW / 2 : true;
  }

  // Largest exponent of every column, negated, into side.last.
  void top_pass(const PointSide<T>& over, PointSide<T>& side) {
    const int64_t step = panels_per_chunk(over, side), n_panels = side.cloud.n_panels();
    for_chunks(team, (n_panels + step - 1) / step, [&](int64_t chunk) {
      for (int64_t p = chunk * step; p < n_panels && p < (chunk + 1) * step; ++p) {
        Vec<T> top[NV];
        for (int v = 0; v < NV; ++v) top[v] = splat<T>(T(-3e38));
        for (int64_t i = 0; i < over.cloud.count; i += POINT_ROWS) {
          const T* block[POINT_ROWS];
          over.cloud.block(i, block);
#pragma GCC unroll 4
          for (int v = 0; v < NV; v += 2) {
            Block<T, 2> tile;
            tile.multiply(block, side.cloud.panel(p) + v * VL, W, dim);
#pragma GCC unroll 6
            for (int r = 0; r < POINT_ROWS; ++r)
#pragma GCC unroll 2
              for (int k = 0; k < 2; ++k) {
                const Vec<T> t = tile.at[r][k] * splat<T>(slope) + splat<T>(over.exponent[i + r]);
                top[v + k] = t > top[v + k] ? t : top[v + k];
              }
          }
        }
        for (int v = 0; v < NV; ++v)
          for (int k = 0; k < VL; ++k) side.last[p * W + v * VL + k] = T(on_grid(-double(top[v][k])));
      }
    });
  }

  // side.sum_j = sum_i scaled_i 2^(slope <x_i, y_j> + exponent_i + last_j)
  void sum_pass(const PointSide<T>& over, PointSide<T>& side) {
    const int64_t step = panels_per_chunk(over, side), n_panels = side.cloud.n_panels();
    for_chunks(team, (n_panels + step - 1) / step, [&](int64_t chunk) {
      for (int64_t p = chunk * step; p < n_panels && p < (chunk + 1) * step; ++p)
        column_sums(over, side, p, side.last, static_cast<T*>(nullptr));
    });
  }

  // Kernels of one panel: their weighted sums into side.sum, themselves into K [rows, W] unless it is null.
  void column_sums(const PointSide<T>& over, PointSide<T>& side, int64_t p, const T* reference, T* K) {
    Vec<T> total[NV] = {}, chain[NV] = {};
    const auto flush = [&] {
      for (int v = 0; v < NV; ++v) total[v] += chain[v], chain[v] = Vec<T>{};
    };
    const Vec<T> scale = splat<T>(slope);
    const T *exponent = over.exponent, *weight = over.scaled;
    int64_t links = 0;
    for (int64_t i = 0; i < over.cloud.count; i += POINT_ROWS) {
      const T* block[POINT_ROWS];
      over.cloud.block(i, block);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v += 2) {
        Block<T, 2> tile;
        tile.multiply(block, side.cloud.panel(p) + v * VL, W, dim);
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const Vec<T> col = load<T>(reference + p * W + (v + k) * VL);
          Vec<T> sum{};
#pragma GCC unroll 3
          for (int r = 0; r < POINT_ROWS; r += STEP) {
            Vec<T> e[STEP];
#pragma GCC unroll 6
            for (int q = 0; q < STEP; ++q) e[q] = tile.at[r + q][k] * scale + (splat<T>(exponent[i + r + q]) + col);
            powers_of_two<T, STEP>(e, P::LOWEST, P::HIGHEST);
#pragma GCC unroll 6
            for (int q = 0; q < STEP; ++q) {
              if (K != nullptr) store<T>(K + (i + r + q) * W + (v + k) * VL, e[q]);
              sum += e[q] * splat<T>(weight[i + r + q]);
            }
          }
          chain[v + k] += sum;
        }
      }
      if (++links == ROW_CHAIN) flush(), links = 0;
    }
    flush();
    for (int v = 0; v < NV; ++v)
      for (int k = 0; k < VL; ++k) {
        const int64_t j = p * W + v * VL + k;
        side.sum[j] = j < side.cloud.count ? double(total[v][k]) : 1.0;
      }
  }

  // ---- both sides in one pass -----------------------------------------------------------------------------------------

  // Where K is computed: half way between the potential and the undamped one, so that the scaled weights and the sums both
  // carry half of a marginal that damping makes small.
  double centred_exponent(const PointSide<T>& side, int64_t i) const {
    return rate * (side.potential[i] * (1 + side.tau) / (2 * side.tau) - side.norm[i]);
  }
  void recentre() {
    double top = 0;
    for (int64_t i = 0; i < rows.cloud.count; ++i) top = larger(magnitude(centred_exponent(rows, i)), top);
    for (int64_t j = 0; j < cols.cloud.count; ++j) top = larger(magnitude(centred_exponent(cols, j)), top);
    fit_grid(top);
    if (sound) round_exponents(rows), round_exponents(cols);
  }
  void round_exponents(PointSide<T>& side) const {
    for (int64_t i = 0; i < side.cloud.count; ++i) {
      side.exponent[i] = T(on_grid(centred_exponent(side, i)));
      side.centre[i] = double(side.exponent[i]) / rate + side.norm[i];
    }
  }
  void scale_weights(PointSide<T>& side, const double* potential, int64_t from, int64_t to) const {
    using D = Vec<double>;
    const D inverse = splat<double>(1 / eps);
    for (int64_t i = from; i < to; i += LANES<double>) {
      const D e = vexp<double>((load<double>(potential + i) - load<double>(side.centre + i)) * inverse);
      const D w = load<double>(side.weight + i) * e;
      for (int k = 0; k < LANES<double>; ++k) side.scaled[i + k] = T(w[k]);
    }
  }
  // False if T cannot hold them.
  bool weigh_up(PointSide<T>& side) const {
    double total = 0, least = __builtin_inf();
    for (int64_t i = 0; i < side.cloud.count; ++i) {
      if (!(side.weight[i] > 0)) continue;
      const double w = double(side.scaled[i]);
      total += w, least = w < least ? w : least;
    }
    side.total = total, side.least = least;
    return least > 0 && finite(T(total));
  }
  bool in_range(const PointSide<T>& of, const PointSide<T>& side) const {
    const double low = of.total * low_sum, high = of.least * high_sum;
    bool inside = true;
    for (int64_t i = 0; i < side.cloud.count; ++i) inside = inside && side.sum[i] >= low && side.sum[i] <= high;
    return inside;
  }
  // next = tau (centre - epsilon log sum)
  void damp(PointSide<T>& side, int64_t from, int64_t to) const {
    using D = Vec<double>;
    const D e = splat<double>(eps), tau = splat<double>(side.tau);
    for (int64_t i = from; i < to; i += LANES<double>)
      store<double>(side.next + i, tau * (load<double>(side.centre + i) - e * vlog<double>(load<double>(side.sum + i))));
  }

  // cols.next from the row potentials, and the row sums that follow from it, every kernel computed once: the previous
  // potentials are its reference. 0: a column is out of range, 1: only the rows' sums are, 2: all is right.
  int both_sides() {
    recentre();
    if (!sound) return 0;
    scale_weights(rows, rows.potential, 0, rows.padded);
    if (!weigh_up(rows)) return 0;
    const int64_t step = panels_per_chunk(rows, cols), n_panels = cols.cloud.n_panels(), chunks = (n_panels + step - 1) / step;
    const int64_t n = rows.cloud.count;
    for_chunks(team, chunks, [&](int64_t chunk) {
      const int piece = pieces.take();
      T *K = pieces.template at<T>(piece), *lanes = K + rows.padded * W;
      memset(lanes, 0, size_t(n * VL) * sizeof(T));
      for (int64_t p = chunk * step; p < n_panels && p < (chunk + 1) * step; ++p) {
        column_sums(rows, cols, p, cols.exponent, K);
        damp(cols, p * W, (p + 1) * W);
        scale_weights(cols, cols.next, p * W, (p + 1) * W);
        add_row_sums(K, cols.scaled + p * W, lanes);
      }
      for (int64_t i = 0; i < n; ++i) partial[chunk * rows.padded + i] = double(sum_lanes<T>(load<T>(lanes + i * VL)));
      pieces.give(piece);
    });
    if (!in_range(rows, cols)) return 0;
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * rows.padded + i];
      rows.sum[i] = sum;
    }
    for (int64_t i = n; i < rows.padded; ++i) rows.sum[i] = 1;
    return weigh_up(cols) && in_range(cols, rows) ? 2 : 1;
  }
  void add_row_sums(const T* K, const T* weights, T* lanes) const {
    Vec<T> w[NV];
    for (int v = 0; v < NV; ++v) w[v] = load<T>(weights + v * VL);
    for (int64_t i = 0; i < rows.cloud.count; ++i) {
      Vec<T> even{}, odd{};
#pragma GCC unroll 4
      for (int v = 0; v < NV; v += 2) {
        even += w[v] * load<T>(K + i * W + v * VL);
        odd += w[v + 1] * load<T>(K + i * W + (v + 1) * VL);
      }
      store<T>(lanes + i * VL, load<T>(lanes + i * VL) + (even + odd));
    }
  }
};

}  // namespace
