// One entropic transport problem in scratch memory: scaling iterations without exponentials where the range allows them,
// absorption of large scalings into the potentials, and log-domain steps where nothing else is right.
//
//   plan_ij = a_i exp((f_i + g_j - C_ij) / epsilon) b_j,   K_ij = exp((f_i + g_j - C_ij) / epsilon) for absorbed f, g,
//   total potentials f + epsilon * lu and g + epsilon * lv, scalings u = exp(lu), v = exp(lv).
//
// Matrices are stored in panels of PANEL columns: entry (i, j) is at ((j / PANEL) * n + i) * PANEL + j % PANEL. Both halves
// of an iteration then read a panel from cache and C, K only once from memory. Padding columns have C = inf, K = 0.
#pragma once
#include "vec.h"

namespace {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
template <class T> inline bool finite(T x) { return x - x == 0; }
inline double exp_of(double x) { return __builtin_exp(x); }
inline double log_of(double x) { return __builtin_log(x); }

struct Arena {  // hands out aligned pieces of the scratch memory; with base null it only counts
  char* base;
  size_t used = 0;
  template <class T> T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + used);  // integers: base may be null
    used += size_t(round_up(count * int64_t(sizeof(T)), 64));
    return piece;
  }
};

template <class T> struct Solver {
  using R = Traits<T>;
  static constexpr int W = PANEL<T>, VL = LANES<T>, NV = PANEL_VECTORS;

  int64_t n, m, np, mp, panels;
  T *C, *K;                      // panels
  T *f, *g;                      // absorbed potentials
  T *lu, *lv, *next_u, *next_v;  // logs of the scalings, and room for the next ones
  T *ua, *vb;                    // a u, b v
  T *a, *b, *la, *lb;            // weights and their logs (-inf for 0)
  T *pad_a, *pad_b;              // 1 on padding, else 0: keeps the logs of padding sums at 0
  T *ca, *cb;                    // (tau - 1) * absorbed potential / epsilon
  T *row_sum, *col_sum;          // K v b, K^T u a
  T* lanes;                      // [n, VL] partial row sums
  double *soft, *cap_f, *cap_g;  // log-sums; potentials <= 0 of the exact-mass problem
  T eps, inv_eps;
  double tau_a, tau_b, mass, level;  // level: multiplier of the mass, in cost units
  bool exact_mass, kernel_ready;  // kernel_ready: K, ua, vb and row_sum fit the final potentials
  bool sound;                     // false: T cannot hold what was met on the way, the result is no solution
  int iterations;
  double residual;

  void layout(Arena& arena, int64_t rows, int64_t cols) {
    n = rows, m = cols, np = round_up(rows, VL), mp = round_up(cols, W), panels = mp / W;
    C = arena.take<T>(n * mp), K = arena.take<T>(n * mp);
    T** by_row[] = {&f, &lu, &next_u, &ua, &a, &la, &pad_a, &ca, &row_sum};
    T** by_col[] = {&g, &lv, &next_v, &vb, &b, &lb, &pad_b, &cb, &col_sum};
    for (T** p : by_row) *p = arena.take<T>(np);
    for (T** p : by_col) *p = arena.take<T>(mp);
    lanes = arena.take<T>(n * VL);
    soft = arena.take<double>(np > mp ? np : mp);
    cap_f = arena.take<double>(np), cap_g = arena.take<double>(mp);
  }

  // Weights are in a[0..n) and b[0..m): fill what follows from them.
  void begin(double epsilon, double damp_a, double damp_b, double total, bool with_mass) {
    eps = T(epsilon), inv_eps = T(1.0 / epsilon), tau_a = damp_a, tau_b = damp_b, mass = total, exact_mass = with_mass;
    level = 0, iterations = 0, residual = __builtin_inf();
    sound = finite(eps) && finite(inv_eps);
    side(a, la, pad_a, f, lu, ca, n, np);
    side(b, lb, pad_b, g, lv, cb, m, mp);
  }
  static void side(T* w, T* lw, T* pad, T* pot, T* ls, T* c, int64_t count, int64_t padded) {
    for (int64_t i = 0; i < padded; ++i) {
      if (i >= count) w[i] = 0;
      lw[i] = w[i] > 0 ? T(log_of(w[i])) : -T(__builtin_inf());
      pad[i] = i >= count, pot[i] = 0, ls[i] = 0, c[i] = 0;
    }
  }

  // ---- kernel matrix -------------------------------------------------------------------------------------------------

  // Absorb the scalings into the potentials, rebuild K and the row sums.
  void absorb() {
    for (int64_t i = 0; i < n; ++i) f[i] += eps * lu[i], lu[i] = 0, ua[i] = a[i], ca[i] = T(tau_a - 1) * f[i] * inv_eps;
    for (int64_t j = 0; j < m; ++j) g[j] += eps * lv[j], lv[j] = 0, vb[j] = b[j], cb[j] = T(tau_b - 1) * g[j] * inv_eps;
    for (int64_t i = n; i < np; ++i) ua[i] = 0;
    for (int64_t j = m; j < mp; ++j) vb[j] = 0;
    clear_lanes();
    const Vec<T> scale = splat<T>(inv_eps);
    for (int64_t p = 0; p < panels; ++p) {
      const T *cp = C + p * n * W, *gp = g + p * W, *bp = b + p * W;
      T* kp = K + p * n * W;
      for (int64_t i = 0; i < n; ++i) {
        const Vec<T> fi = splat<T>(f[i]);
        Vec<T> sum{};
        for (int k = 0; k < NV; ++k) {
          const Vec<T> e = vexp<T>(((fi + load<T>(gp + k * VL)) - load<T>(cp + i * W + k * VL)) * scale);
          store<T>(kp + i * W + k * VL, e);
          sum += e * load<T>(bp + k * VL);
        }
        store<T>(lanes + i * VL, load<T>(lanes + i * VL) + sum);
      }
    }
    reduce_lanes();
  }
  void clear_lanes() { memset(lanes, 0, size_t(n * VL) * sizeof(T)); }
  void reduce_lanes() {
    for (int64_t i = 0; i < n; ++i) row_sum[i] = sum_lanes<T>(load<T>(lanes + i * VL));
    for (int64_t i = n; i < np; ++i) row_sum[i] = 0;
  }

  void panel_col_sums(int64_t p) {
    const T* kp = K + p * n * W;
    Vec<T> even[NV] = {}, odd[NV] = {};  // two chains hide the latency of the additions
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
      const Vec<T> u0 = splat<T>(ua[i]), u1 = splat<T>(ua[i + 1]);
#pragma GCC unroll 4
      for (int k = 0; k < NV; ++k) even[k] += u0 * load<T>(kp + i * W + k * VL);
#pragma GCC unroll 4
      for (int k = 0; k < NV; ++k) odd[k] += u1 * load<T>(kp + (i + 1) * W + k * VL);
    }
    if (i < n)
      for (int k = 0; k < NV; ++k) even[k] += splat<T>(ua[i]) * load<T>(kp + i * W + k * VL);
    for (int k = 0; k < NV; ++k) store<T>(col_sum + p * W + k * VL, even[k] + odd[k]);
  }
  void panel_row_sums(int64_t p) {
    const T *kp = K + p * n * W, *vp = vb + p * W;
    Vec<T> v[NV];
    for (int k = 0; k < NV; ++k) v[k] = load<T>(vp + k * VL);
    for (int64_t i = 0; i < n; ++i) {
      const T* row = kp + i * W;
      const Vec<T> even = v[0] * load<T>(row) + v[2] * load<T>(row + 2 * VL);
      const Vec<T> odd = v[1] * load<T>(row + VL) + v[3] * load<T>(row + 3 * VL);
      store<T>(lanes + i * VL, load<T>(lanes + i * VL) + (even + odd));
    }
  }

  // ---- damped updates (balanced, KL) in the scaling domain -------------------------------------------------------------

  struct Update {
    Vec<T> low, high, change, largest;
    Update() : low(splat<T>(T(1))), high(splat<T>(T(1))), change{}, largest{} {}
    bool in_range() const { return min_lanes<T>(low) >= R::SUM_LOW && max_lanes<T>(high) <= R::SUM_HIGH; }
    bool wide() const { return !(max_lanes<T>(largest) <= R::SPREAD); }
    double moved() const { return double(max_lanes<T>(change)); }
  };

  // log scaling = -tau log sum + c, for entries [from, to); ws = weight * scaling.
  static void update(Update& seen, int64_t from, int64_t to, const T* sum, const T* pad, const T* c, T tau, const T* w,
                     const T* ls, T* next, T* ws) {
    for (int64_t j = from; j < to; j += VL) {
      const Vec<T> s = load<T>(sum + j) + load<T>(pad + j);
      seen.low = vmin<T>(s, seen.low), seen.high = vmax<T>(s, seen.high);
      const Vec<T> l = load<T>(c + j) - splat<T>(tau) * vlog<T>(s);
      seen.change = vmax<T>(vabs<T>(l - load<T>(ls + j)), seen.change);
      seen.largest = vmax<T>(vabs<T>(l), seen.largest);
      store<T>(next + j, l);
      store<T>(ws + j, load<T>(w + j) * vexp<T>(l));
    }
  }
  static void exchange(T*& x, T*& y) {
    T* z = x;
    x = y, y = z;
  }

  // Rows from row_sum. False: the sums have left the range, nothing was changed but ua.
  bool scale_rows(double& moved, bool& wide) {
    Update seen;
    update(seen, 0, np, row_sum, pad_a, ca, T(tau_a), a, lu, next_u, ua);
    if (!seen.in_range()) return false;
    exchange(lu, next_u);
    moved = seen.moved(), wide = seen.wide();
    return true;
  }
  // Columns from K^T u a, and the next row sums in the same pass over K.
  bool scale_cols(double& moved, bool& wide) {
    Update seen;
    clear_lanes();
    const int64_t panel_bytes = n * W * int64_t(sizeof(T));
    int64_t group = 24 * 1024 / panel_bytes;  // panels that stay in the first-level cache between the two halves
    group = group < 1 ? 1 : (group > 8 ? 8 : group);
    for (int64_t first = 0; first < panels; first += group) {
      const int64_t last = first + group < panels ? first + group : panels;
      for (int64_t p = first; p < last; ++p) panel_col_sums(p);
      update(seen, first * W, last * W, col_sum, pad_b, cb, T(tau_b), b, lv, next_v, vb);
      for (int64_t p = first; p < last; ++p) panel_row_sums(p);
    }
    if (!seen.in_range()) return false;
    reduce_lanes();
    exchange(lv, next_v);
    moved = seen.moved(), wide = seen.wide();
    return true;
  }

  // ---- log domain ------------------------------------------------------------------------------------------------------

  static constexpr T LOWEST = T(-1e30);  // stands for -inf where a difference is taken

  // soft_i = log sum_j b_j exp((g_j + epsilon lv_j - C_ij) / epsilon)
  void log_rows() {
    for (int64_t j = 0; j < mp; ++j) next_v[j] = j < m ? g[j] + eps * lv[j] : T(0);
    const Vec<T> scale = splat<T>(inv_eps);
    for (int64_t i = 0; i < n; ++i) {
      Vec<T> top = splat<T>(LOWEST), sum{};
      for (int64_t j = 0; j < mp; j += VL)
        top = vmax<T>((load<T>(next_v + j) - load<T>(entry(C, i, j))) * scale + load<T>(lb + j), top);
      const T peak = max_lanes<T>(top);
      for (int64_t j = 0; j < mp; j += VL)
        sum += vexp<T>((load<T>(next_v + j) - load<T>(entry(C, i, j))) * scale + load<T>(lb + j) - splat<T>(peak));
      soft[i] = double(peak) + log_of(double(sum_lanes<T>(sum)));
    }
  }
  // soft_j = log sum_i a_i exp((f_i + epsilon lu_i - C_ij) / epsilon)
  void log_cols() {
    for (int64_t i = 0; i < n; ++i) next_u[i] = f[i] + eps * lu[i];
    const Vec<T> scale = splat<T>(inv_eps);
    for (int64_t j = 0; j < m; j += VL) {
      Vec<T> top = splat<T>(LOWEST), sum{};
      for (int64_t i = 0; i < n; ++i)
        top = vmax<T>((splat<T>(next_u[i]) - load<T>(entry(C, i, j))) * scale + splat<T>(la[i]), top);
      for (int64_t i = 0; i < n; ++i)
        sum += vexp<T>((splat<T>(next_u[i]) - load<T>(entry(C, i, j))) * scale + splat<T>(la[i]) - top);
      for (int k = 0; k < VL && j + k < m; ++k) soft[j + k] = double(top[k]) + log_of(double(sum[k]));
    }
  }
  static T* entry(T* matrix, int64_t i, int64_t j, int64_t rows) { return matrix + ((j / W) * rows + i) * W + j % W; }
  T* entry(T* matrix, int64_t i, int64_t j) const { return entry(matrix, i, j, n); }

  // Potentials from soft: pot = -epsilon tau soft, scaling 1.
  double set_from_soft(T* pot, T* ls, double tau, int64_t count) {
    double moved = 0;
    for (int64_t i = 0; i < count; ++i) {
      const T before = pot[i] + eps * ls[i], after = T(-double(eps) * tau * soft[i]);
      const double change = double(after > before ? after - before : before - after) * double(inv_eps);
      moved = change > moved ? change : moved;
      pot[i] = after, ls[i] = 0;
      sound = sound && finite(after);
    }
    return moved;
  }

  // ---- exact mass ------------------------------------------------------------------------------------------------------

  // Level and caps of one side from its log-sums: weights * min(1, exp(level / epsilon + soft)) must sum to the mass.
  // Newton's method on a concave piecewise linear function of exp(level / epsilon): from the left it never overshoots.
  // A row counts as full from `slack` on: when the mass is exactly the weight of the fullest rows, rounding must not send
  // the level to where the next, perhaps far, row fills up.
  double saturate(const T* w, double* cap, int64_t count) {
    const double slack = sizeof(T) == 4 ? 1e-6 : 1e-11;
    for (int64_t i = 0; i < count; ++i) sound = sound && finite(soft[i]);
    double x = level / double(eps);
    for (int attempt = 0; attempt < 200; ++attempt) {
      double full = 0, open = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (!(w[i] > 0)) continue;
        if (x + soft[i] > slack) full += w[i];
        else open += w[i] * exp_of(x + soft[i]);
      }
      const double room = mass - full;
      if (!(room > 0) || !(open > 0)) {
        if (attempt > 0 && open <= 0) break;  // all rows are full, to rounding
        x = log_of(mass) - log_total(w, count);
        continue;
      }
      const double step = log_of(room / open);
      x += step;
      if (step < 1e-12 && step > -1e-12) break;
    }
    double moved = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double after = x + soft[i] > 0 ? -(x + soft[i]) * double(eps) : 0.0;
      const double change = (after > cap[i] ? after - cap[i] : cap[i] - after) * double(inv_eps);
      moved = change > moved ? change : moved;
      cap[i] = after;
    }
    level = x * double(eps);
    return moved;
  }
  double log_total(const T* w, int64_t count) const {  // log sum_i w_i exp(soft_i)
    double top = -1e300, sum = 0;
    for (int64_t i = 0; i < count; ++i)
      if (w[i] > 0 && soft[i] > top) top = soft[i];
    for (int64_t i = 0; i < count; ++i)
      if (w[i] > 0) sum += w[i] * exp_of(soft[i] - top);
    return top + log_of(sum);
  }

  // One iteration; the row potential carries the level. scaled: K fits the potentials.
  double mass_iteration(bool& scaled) {
    const double before = level;
    if (!scaled || !soft_from_sums(row_sum, f, n, 0.0)) log_rows(), scaled = false;
    double moved = saturate(a, cap_f, n);
    for (int64_t i = 0; i < n; ++i) lu[i] = T((cap_f[i] + level - double(f[i])) * double(inv_eps));
    bool wide = scalings(lu, a, ua, n);
    if (scaled && !wide) {
      for (int64_t p = 0; p < panels; ++p) panel_col_sums(p);
    }
    if (!scaled || wide || !soft_from_sums(col_sum, g, m, level)) {
      log_cols(), scaled = false;
      for (int64_t j = 0; j < m; ++j) soft[j] -= level * double(inv_eps);
    }
    const double moved_cols = saturate(b, cap_g, m);
    for (int64_t i = 0; i < n; ++i) lu[i] = T((cap_f[i] + level - double(f[i])) * double(inv_eps));
    for (int64_t j = 0; j < m; ++j) lv[j] = T((cap_g[j] - double(g[j])) * double(inv_eps));
    wide = scalings(lu, a, ua, n) | scalings(lv, b, vb, m);
    if (scaled && !wide) {
      clear_lanes();
      for (int64_t p = 0; p < panels; ++p) panel_row_sums(p);
      reduce_lanes();
    } else {
      absorb(), scaled = true;
    }
    const double shift = (level > before ? level - before : before - level) * double(inv_eps);
    moved = moved_cols > moved ? moved_cols : moved;
    return shift > moved ? shift : moved;
  }
  // soft = log sum - (absorbed potential + offset) / epsilon; false if a sum has left the range.
  bool soft_from_sums(const T* sum, const T* pot, int64_t count, double offset) {
    for (int64_t i = 0; i < count; ++i)
      if (!(sum[i] >= R::SUM_LOW && sum[i] <= R::SUM_HIGH)) return false;
    for (int64_t i = 0; i < count; ++i) soft[i] = log_of(double(sum[i])) - (double(pot[i]) + offset) * double(inv_eps);
    return true;
  }
  static bool scalings(const T* ls, const T* w, T* ws, int64_t count) {
    bool wide = false;
    for (int64_t i = 0; i < count; ++i) {
      wide |= !(ls[i] <= R::SPREAD && ls[i] >= -R::SPREAD);
      ws[i] = w[i] * T(exp_of(double(ls[i])));
    }
    return wide;
  }

  // ---- the whole solve -------------------------------------------------------------------------------------------------

  // Iterate until the residual is below tol. low, high: range of C. warm_f, warm_g: f (g) holds potentials to start from.
  void solve(double low, double high, int max_iters, double tol, bool warm_f, bool warm_g) {
    bool scaled = false;
    kernel_ready = false;
    if (exact_mass) {
      start_mass(warm_f, warm_g);
    } else if (warm_f && !warm_g) {
      log_cols(), set_from_soft(g, lv, tau_b, m);
    }
    if (!warm_f && !warm_g && (high - low) * double(inv_eps) <= double(R::SPREAD)) {
      // Close costs: K at f = low, g = 0 lies in [exp(-SPREAD), 1]. The total row potential stays 0: only the first
      // change is measured against it.
      for (int64_t i = 0; i < n; ++i) f[i] = T(low);
      absorb();
      for (int64_t i = 0; i < n; ++i) lu[i] = -T(low) * inv_eps;
      scaled = true;
    }
    int failures = 0, log_left = 0;
    while (iterations < max_iters) {
      ++iterations;
      if (exact_mass) {
        residual = mass_iteration(scaled);
      } else {
        residual = damped_iteration(scaled, failures, log_left);
      }
      residual = double(T(residual));  // what the caller sees is what is compared
      if (residual < tol || !sound) break;
    }
    if (exact_mass) {
      for (int64_t i = 0; i < n; ++i) f[i] = T(cap_f[i] + level / 2), lu[i] = 0;
      for (int64_t j = 0; j < m; ++j) g[j] = T(cap_g[j] + level / 2), lv[j] = 0;
      scaled = false;
    }
    kernel_ready = scaled;
    for (int64_t i = 0; i < n; ++i) sound = sound && finite(T(row_potential(i)));
    for (int64_t j = 0; j < m; ++j) sound = sound && finite(T(col_potential(j)));
  }
  // One iteration f, then g. After steps that the scaling domain cannot represent, log-domain iterations take over for
  // a while: twice as many after each failure, up to 64.
  double damped_iteration(bool& scaled, int& failures, int& log_left) {
    double moved = 0, moved_cols = 0;
    bool wide = false, trouble = false;
    if (!scaled) {
      log_rows();
      moved = set_from_soft(f, lu, tau_a, n);
      log_cols();
      moved_cols = set_from_soft(g, lv, tau_b, m);
      if (--log_left <= 0) absorb(), scaled = true;
      return moved > moved_cols ? moved : moved_cols;
    }
    if (!scale_rows(moved, wide)) {
      log_rows();
      moved = set_from_soft(f, lu, tau_a, n);
      absorb(), trouble = true;
    } else if (wide) {
      absorb(), trouble = true;
    }
    wide = false;
    if (!scale_cols(moved_cols, wide)) {
      log_cols();
      moved_cols = set_from_soft(g, lv, tau_b, m);
      absorb(), trouble = true;
    } else if (wide) {
      absorb(), trouble = true;
    }
    failures = trouble ? failures + 1 : 0;
    if (failures >= 2) {
      log_left = 1 << (failures < 8 ? failures - 2 : 6);
      scaled = false;
    }
    return moved > moved_cols ? moved : moved_cols;
  }

  // Potentials of the exact-mass problem start at caps 0; the largest given potential is its side's half of the level.
  void start_mass(bool warm_f, bool warm_g) {
    double top_f = warm_f ? -1e300 : 0, top_g = warm_g ? -1e300 : 0;
    for (int64_t i = 0; i < n && warm_f; ++i) top_f = f[i] > top_f ? f[i] : top_f;
    for (int64_t j = 0; j < m && warm_g; ++j) top_g = g[j] > top_g ? g[j] : top_g;
    for (int64_t i = 0; i < n; ++i) cap_f[i] = warm_f ? f[i] - top_f : 0, f[i] = T(cap_f[i]);
    for (int64_t j = 0; j < m; ++j) cap_g[j] = warm_g ? g[j] - top_g : 0, g[j] = T(cap_g[j]);
    level = top_f + top_g;
    if (warm_f && !warm_g) {
      log_cols();
      saturate(b, cap_g, m);
      for (int64_t j = 0; j < m; ++j) g[j] = T(cap_g[j]);
    }
    for (int64_t i = 0; i < n; ++i) f[i] = T(cap_f[i] + level);
  }

  // Make K fit for plan rows scaled to sum 1, in which f cancels: where a row has left the range (strong damping), f of
  // an undamped half step takes its place and what is missing goes into ua.
  void prepare_rows() {
    if (!kernel_ready) absorb();
    bool in_range = true;
    for (int64_t i = 0; i < n; ++i) in_range = in_range && row_sum[i] >= R::SUM_LOW && row_sum[i] <= R::SUM_HIGH;
    if (in_range) return;
    log_rows();
    for (int64_t i = 0; i < n; ++i) {
      cap_f[i] = row_potential(i) * double(inv_eps) + soft[i];
      f[i] = T(-double(eps) * soft[i]), lu[i] = 0;
    }
    absorb();
    for (int64_t i = 0; i < n; ++i) ua[i] = a[i] * T(exp_of(cap_f[i]));
  }

  double row_potential(int64_t i) const { return double(f[i]) + double(eps) * double(lu[i]); }
  double col_potential(int64_t j) const { return double(g[j]) + double(eps) * double(lv[j]); }
};

}  // namespace
