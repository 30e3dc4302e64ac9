// Problems with an exact transported mass: potentials are caps <= 0, and one level carries the multiplier of the mass.
#pragma once
#include "log_domain.h"

namespace {

// log sum_i w_i exp(soft_i) over the entries with soft_i <= limit, and the weight of the others.
struct Split {
  double log_open, full;
};
template <class T> Split split_at(const Side<T>& side, double limit) {
  using V = Vec<double>;
  constexpr int VL = LANES<double>;
  const V below = splat<double>(limit), lowest = splat<double>(-1e300);
  V top = lowest, open{}, full{};
  for (int64_t i = 0; i < side.padded; i += VL) {
    const V soft = load<double>(side.soft + i);
    const Int<double> counts = (Int<double>)(soft <= below) & (Int<double>)(load<double>(side.mass_weight + i) > 0);
    top = vmax<double>(select<double>(counts, soft, lowest), top);
  }
  const double peak = max_lanes<double>(top);
  for (int64_t i = 0; i < side.padded; i += VL) {
    const V soft = load<double>(side.soft + i), weight = load<double>(side.mass_weight + i), none{};
    const Int<double> counts = (Int<double>)(soft <= below);
    open += select<double>(counts, weight * vexp<double>(soft - splat<double>(peak)), none);
    full += select<double>(counts, none, weight);
  }
  return {peak + log_of(sum_lanes<double>(open)), sum_lanes<double>(full)};
}

// Level (in units of epsilon) of one side from its log-sums: weights * min(1, exp(level + soft)) must sum to the mass.
// Newton's method on a concave piecewise linear function of exp(level): every step ends left of the solution.
// An entry counts as full from `slack` on: when the mass is exactly the weight of the fullest ones, rounding must not
// send the level to where the next, perhaps far, one fills up.
template <class T> double find_level(const State<T>& s, const Side<T>& side) {
  const double slack = sizeof(T) == 4 ? 1e-6 : 1e-11, log_mass = log_of(s.mass);
  double x = s.level / s.eps;
  for (int attempt = 0; attempt < 200; ++attempt) {
    const Split now = split_at(side, slack - x);
    const double room = s.mass - now.full;
    double next = log_of(room) - now.log_open;
    if (!(room > 0) || !finite(next)) {  // too far right, or all are full, to rounding
      if (attempt > 0) break;
      next = log_mass - split_at(side, __builtin_inf()).log_open;
    }
    const double step = magnitude(next - x);
    x = next;
    if (step < 1e-12 + 4e-16 * magnitude(x)) break;
  }
  return x;
}

// Level from the sums of K: soft = log sum - (reference + offset) / epsilon. False if a sum has left the range. A sum
// that is too small is only known to be small: enough where its entry stays as good as empty at the level that is found.
template <class T> bool level_from_sums(const State<T>& s, Side<T>& side, double offset, double& x) {
  using R = Traits<T>;
  bool small = false;
  for (int64_t i = 0; i < side.count; ++i) {
    if (!(side.sum[i] <= R::SUM_HIGH)) return false;
    small = small || side.sum[i] < R::SUM_LOW;
    side.soft[i] = double(larger(side.sum[i], R::SUM_LOW));
  }
  for (int64_t i = side.count; i < side.padded; ++i) side.soft[i] = 1;
  for (int64_t i = 0; i < side.padded; i += LANES<double>)
    store<double>(side.soft + i, vlog<double>(load<double>(side.soft + i)));
  const double inv_eps = 1 / s.eps;
  for (int64_t i = 0; i < side.count; ++i) side.soft[i] -= (double(side.reference[i]) + offset) * inv_eps;
  x = find_level(s, side);
  for (int64_t i = 0; small && i < side.count; ++i)
    if (side.sum[i] < R::SUM_LOW && !(x + side.soft[i] < -30.0)) return false;
  return true;
}

// Caps at a level. Returns the largest change of one in units of epsilon.
template <class T> double set_caps(State<T>& s, Side<T>& side, double x) {
  double moved = 0;
  for (int64_t i = 0; i < side.count; ++i) {
    s.sound = s.sound && finite(side.soft[i]);
    const double marginal = x + side.soft[i], cap = marginal > 0 ? -marginal * s.eps : 0.0;
    moved = larger(magnitude(cap - side.cap[i]) / s.eps, moved);
    side.cap[i] = cap;
  }
  s.level = x * s.eps;
  return moved;
}

// Scalings of the potential cap + offset; false if one has left the range.
template <class T> bool scale_to_caps(State<T>& s, Side<T>& side, double offset) {
  using R = Traits<T>;
  bool in_range = true;
  for (int64_t i = 0; i < side.count; ++i) {
    const T l = T((side.cap[i] + offset - double(side.reference[i])) / s.eps);
    side.log_scaling[i] = l;
    in_range = in_range && l >= R::SCALING_LOW && l <= R::SCALING_HIGH;
  }
  side.weigh();
  return in_range;
}

// Level of the columns by log-sums over rows whose potential carries the level.
template <class T> double log_cols_level(State<T>& s) {
  log_cols(s);
  for (int64_t j = 0; j < s.m; ++j) s.cols.soft[j] -= s.level / s.eps;
  return find_level(s, s.cols);
}

// Half iterations; the row potential carries the level. scaled: K fits the potentials, before and after. They return the
// largest change of a cap in units of epsilon.
template <class T> double mass_rows(State<T>& s, bool& scaled) {
  double x;
  scaled = scaled && level_from_sums(s, s.rows, 0.0, x);
  if (!scaled) log_rows(s), x = find_level(s, s.rows);
  return set_caps(s, s.rows, x);
}
template <class T> double mass_cols(State<T>& s, bool& scaled) {
  double x;
  scaled = scale_to_caps(s, s.rows, s.level) && scaled;
  if (scaled) {
    for (int64_t p = 0; p < s.panels; ++p) panel_col_sums(s, p);
    scaled = level_from_sums(s, s.cols, s.level, x);
  }
  if (!scaled) x = log_cols_level(s);
  const double moved = set_caps(s, s.cols, x);
  scaled = scale_to_caps(s, s.rows, s.level) && scaled;
  scaled = scale_to_caps(s, s.cols, 0.0) && scaled;
  if (scaled) {
    clear_lanes(s);
    for (int64_t p = 0; p < s.panels; ++p) panel_row_sums(s, p);
    reduce_lanes(s);
  }
  return moved;
}
// Start from caps 0; the largest given potential is its side's half of the level.
template <class T> void start_mass(State<T>& s, bool warm_rows, bool warm_cols) {
  const auto start = [](Side<T>& side) {
    double top = -1e300;
    for (int64_t i = 0; i < side.count; ++i) top = larger(double(side.reference[i]), top);
    for (int64_t i = 0; i < side.count; ++i) side.cap[i] = double(side.reference[i]) - top;
    return top;
  };
  s.level = (warm_rows ? start(s.rows) : 0.0) + (warm_cols ? start(s.cols) : 0.0);
  scale_to_caps(s, s.rows, 0.0), scale_to_caps(s, s.cols, 0.0);
  if (warm_rows && !warm_cols) {
    log_cols(s);
    set_caps(s, s.cols, find_level(s, s.cols));
    scale_to_caps(s, s.cols, 0.0);
  }
  scale_to_caps(s, s.rows, s.level);
}

}  // namespace
