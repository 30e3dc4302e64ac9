// One entropic transport problem in scratch memory.
//
//   plan_ij = a_i u_i K_ij v_j b_j,   K_ij = exp((f_i + g_j - C_ij) / epsilon),   u = exp(lu), v = exp(lv),
//   potentials of the problem: f + epsilon lu and g + epsilon lv.
//
// The reference potentials f, g are multiples of one power of two, coarse enough that f_i + g_j is exact in T: what
// rounding leaves is relative to the exponent, not to the potentials. The scalings hold the rest.
//
// Matrices are stored in panels of PANEL columns: entry (i, j) is at ((j / PANEL) * n + i) * PANEL + j % PANEL. Both halves
// of an iteration then read a panel from cache and C, K only once from memory. Padding columns have C = inf, K = 0.
#pragma once
#include "team.h"
#include "vec.h"

namespace {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
template <class T> inline bool finite(T x) { return x - x == 0; }
template <class T> inline T larger(T x, T y) { return x > y ? x : y; }
inline double magnitude(double x) { return x < 0 ? -x : x; }
inline double exp_of(double x) { return __builtin_exp(x); }
inline double log_of(double x) { return __builtin_log(x); }
template <class T> inline void exchange(T*& x, T*& y) {
  T* z = x;
  x = y, y = z;
}

struct Arena {  // hands out aligned pieces of the scratch memory; with base null it only counts
  char* base;
  size_t used = 0;
  template <class T> T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + used);  // integers: base may be null
    used += size_t(round_up(count * int64_t(sizeof(T)), 64));
    return piece;
  }
};

// Rows or columns of a problem. Entries [count, padded) are padding with weight 0.
template <class T> struct Side {
  int64_t count, padded;
  T* reference;      // f or g
  T* log_scaling;    // lu or lv
  T* scaling;        // u or v, kept where tau is 1
  T* next;           // room for the next log_scaling or scaling
  T* scaled_weight;  // a u or b v
  T *weight, *log_weight;  // log 0 = -inf
  T* pad;            // 1 on padding, else 0: keeps the logs of padding sums at 0
  T* damping;        // (tau - 1) reference / epsilon
  T* sum;            // K v b or K^T u a
  double* soft;      // log of the weighted sums without this side's potential
  double* mass_weight;  // exact mass: the weights
  double* cap;       // exact mass: potential <= 0, without the level
  double* open;      // exact mass: what entries would carry at the last level
  double tau;
  bool by_ratio;  // scaling holds exp(log_scaling): a change can be measured as a ratio
  bool stale;     // log_scaling is behind scaling

  void layout(Arena& arena, int64_t size, int64_t multiple) {
    count = size, padded = round_up(size, multiple);
    T** pieces[] = {&reference, &log_scaling, &scaling, &next, &scaled_weight, &weight, &log_weight, &pad, &damping, &sum};
    for (T** piece : pieces) *piece = arena.take<T>(padded);
    soft = arena.take<double>(padded), mass_weight = arena.take<double>(padded), cap = arena.take<double>(padded);
    open = arena.take<double>(padded);
  }
  // Weights are in weight[0..count): fill what follows from them.
  void begin(double damp) {
    tau = damp, by_ratio = stale = false;
    for (int64_t i = 0; i < padded; ++i) {
      if (i >= count) weight[i] = 0;
      log_weight[i] = weight[i] > 0 ? T(log_of(weight[i])) : -T(__builtin_inf());
      pad[i] = i >= count, reference[i] = 0, log_scaling[i] = 0, damping[i] = 0, sum[i] = 0;
      soft[i] = 0, cap[i] = 0, mass_weight[i] = double(weight[i]);
    }
  }
  double potential(int64_t i, double eps) const { return double(reference[i]) + eps * double(log_scaling[i]); }
  // Where K is built: half way between the potential and the undamped one, so that the scalings and the sums both carry
  // half of a marginal that damping makes small.
  double centre(double potential) const { return potential * ((1 + tau) / (2 * tau)); }
  // What K needs beside the references. False if a scaling has left its range.
  bool begin_scaling(double eps) {
    bool in_range = true;
    for (int64_t i = 0; i < count; ++i) {
      damping[i] = T((tau - 1) / eps * double(reference[i]));
      in_range = in_range && log_scaling[i] >= Traits<T>::SCALING_LOW && log_scaling[i] <= Traits<T>::SCALING_HIGH;
    }
    weigh();
    by_ratio = tau == 1 && in_range;
    return in_range;
  }
  void weigh() {
    for (int64_t i = 0; i < padded; i += LANES<T>) {
      const Vec<T> u = vexp<T>(load<T>(log_scaling + i));
      store<T>(scaling + i, u), store<T>(scaled_weight + i, load<T>(weight + i) * u);
    }
  }
  // Logs of the scalings, where an update has left them out.
  void settle() {
    if (!stale) return;
    for (int64_t i = 0; i < padded; i += LANES<T>) store<T>(log_scaling + i, vlog<T>(load<T>(scaling + i)));
    stale = false;
  }
};

template <class T> struct State {
  using R = Traits<T>;
  static constexpr int W = PANEL<T>, VL = LANES<T>;

  int64_t n, m, panels;
  Chunks chunks;  // of panels
  Team* team = nullptr;
  T *C, *K;  // panels
  Side<T> rows, cols;
  T* lanes;  // [chunks, rows.padded, VL] partial row sums
  T inv_eps;
  double eps, grid;    // grid: the references are multiples of it
  double mass, level;  // level: multiplier of the mass, in cost units
  bool exact_mass;
  bool sound;  // false: T cannot hold what was met on the way, the result is no solution

  void layout(Arena& arena, int64_t n_rows, int64_t n_cols) {
    n = n_rows, m = n_cols, panels = round_up(n_cols, W) / W;
    C = arena.take<T>(n * panels * W), K = arena.take<T>(n * panels * W);
    rows.layout(arena, n, VL), cols.layout(arena, m, W);
    chunks = Chunks::of(panels, n * W, true);  // even: panels are worked on in pairs
    lanes = arena.take<T>(Chunks::bound(panels, n * W) * rows.padded * VL);
  }
  void begin(double epsilon, double tau_a, double tau_b, double total, bool with_mass) {
    eps = epsilon, inv_eps = T(1.0 / epsilon), mass = total, exact_mass = with_mass, level = 0;
    grid = 0;
    sound = finite(T(eps)) && finite(inv_eps);
    rows.begin(with_mass ? 1.0 : tau_a), cols.begin(with_mass ? 1.0 : tau_b);
  }
  void settle() { rows.settle(), cols.settle(); }
  double row_potential(int64_t i) const { return rows.potential(i, eps); }
  double col_potential(int64_t j) const { return cols.potential(j, eps); }
  T* entry(T* matrix, int64_t i, int64_t j) const { return matrix + ((j / W) * n + i) * W + j % W; }

  // Coarsen the grid until it carries numbers as large as top.
  void fit_grid(double top) {
    if (!finite(T(top))) {
      sound = false;
      return;
    }
    if (top <= grid * double(int64_t(1) << R::GRID_BITS)) return;
    int exponent;
    __builtin_frexp(top, &exponent);  // top < 2^exponent
    exponent -= R::GRID_BITS;
    grid = __builtin_ldexp(1.0, exponent > -120 ? exponent : -120);
  }
  // Split a potential into a reference near `centre` and a scaling.
  void split(Side<T>& side, int64_t i, double potential, double centre) {
    side.reference[i] = on_grid(centre);
    side.log_scaling[i] = T((potential - double(side.reference[i])) * (1 / eps));
  }
  T on_grid(double x) const {
    const double shift = 0x1.8p52 * grid;  // the sum has this grid as its unit in the last place
    return T((x + shift) - shift);
  }
  void split_all(Side<T>& side, bool centred) {
    for (int64_t i = 0; i < side.count; ++i) {
      const double potential = side.potential(i, eps);
      split(side, i, potential, centred ? side.centre(potential) : potential);
    }
  }
  double top(const Side<T>& side) const {
    double top = 0;
    for (int64_t i = 0; i < side.count; ++i) {
      const double centre = magnitude(side.centre(side.potential(i, eps)));
      if (!(centre <= top)) top = centre;
    }
    return top;
  }
};

}  // namespace
