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
// The same where side.open holds w_i exp(level + soft_i). What double cannot hold there is left to `split_at`.
template <class T> Split split_near(const Side<T>& side, double limit, double level) {
  using V = Vec<double>;
  const V below = splat<double>(limit), none{};
  V open{}, full{};
  for (int64_t i = 0; i < side.padded; i += LANES<double>) {
    const Int<double> counts = (Int<double>)(load<double>(side.soft + i) <= below);
    open += select<double>(counts, load<double>(side.open + i), none);
    full += select<double>(counts, none, load<double>(side.mass_weight + i));
  }
  const double total = sum_lanes<double>(open);
  if (!(total > 1e-200 && total < 1e200)) return split_at(side, limit);
  return {log_of(total) - level, sum_lanes<double>(full)};
}

// Level (in units of epsilon) of one side from its log-sums: weights * min(1, exp(level + soft)) must sum to the mass.
// Newton's method on a concave piecewise linear function of exp(level): every step ends left of the solution.
// An entry counts as full from `slack` on: when the mass is exactly the weight of the fullest ones, rounding must not
// send the level to where the next, perhaps far, one fills up.
template <class T> double find_level(const State<T>& s, const Side<T>& side) {
  const double slack = sizeof(T) == 4 ? 1e-6 : 1e-11, log_mass = log_of(s.mass), start = s.level / s.eps;
  for (int64_t i = 0; i < side.padded; i += LANES<double>) {
    const Vec<double> carried = vexp<double>(load<double>(side.soft + i) + splat<double>(start));
    store<double>(side.open + i, load<double>(side.mass_weight + i) * carried);
  }
  double x = start;
  for (int attempt = 0; attempt < 200; ++attempt) {
    const Split now = split_near(side, slack - x, start);
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
  Vec<T> low = splat<T>(T(1)), high = low;
  for (int64_t i = 0; i < side.padded; i += LANES<T>) {
    const Vec<T> sum = load<T>(side.sum + i) + load<T>(side.pad + i);
    low = vmin<T>(sum, low), high = vmax<T>(sum, high);
  }
  if (!(max_lanes<T>(high) <= R::SUM_HIGH)) return false;
  const Vec<double> least = splat<double>(R::SUM_LOW), shift = splat<double>(offset), scale = splat<double>(1 / s.eps);
  for (int64_t i = 0; i < side.padded; i += LANES<double>) {
    const Vec<double> sum = load_wide(side.sum + i);
    store<double>(side.soft + i, vlog<double>(vmax<double>(sum, least)) - (load_wide(side.reference + i) + shift) * scale);
  }
  x = find_level(s, side);
  if (min_lanes<T>(low) >= R::SUM_LOW) return true;
  for (int64_t i = 0; i < side.count; ++i)
    if (side.sum[i] < R::SUM_LOW && !(x + side.soft[i] < -30.0)) return false;
  return true;
}

// Caps at a level. Returns the largest change of one in units of epsilon.
template <class T> double set_caps(State<T>& s, Side<T>& side, double x) {
  using V = Vec<double>;
  for (int64_t i = side.count; i < side.padded; ++i) side.soft[i] = -x;  // padding has caps 0
  V moved{}, zero{};
  for (int64_t i = 0; i < side.padded; i += LANES<double>) {
    const V soft = load<double>(side.soft + i), cap = -vmax<double>(soft + splat<double>(x), V{}) * splat<double>(s.eps);
    moved = vmax<double>(vabs<double>(cap - load<double>(side.cap + i)), moved);
    zero += soft - soft;  // NaN as soon as one entry is not finite
    store<double>(side.cap + i, cap);
  }
  s.sound = s.sound && sum_lanes<double>(zero) == 0;
  s.level = x * s.eps;
  return max_lanes<double>(moved) / s.eps;
}

// Scalings of the potential cap + offset; false if one has left the range.
template <class T> bool scale_to_caps(State<T>& s, Side<T>& side, double offset) {
  using R = Traits<T>;
  const Vec<double> scale = splat<double>(1 / s.eps), shift = splat<double>(offset);
  for (int64_t i = 0; i < side.padded; i += LANES<double>)
    store_narrow(side.log_scaling + i, (load<double>(side.cap + i) + shift - load_wide(side.reference + i)) * scale);
  for (int64_t i = side.count; i < side.padded; ++i) side.log_scaling[i] = 0;
  side.weigh();
  Vec<T> low{}, high{};
  for (int64_t i = 0; i < side.padded; i += LANES<T>)
    low = vmin<T>(load<T>(side.log_scaling + i), low), high = vmax<T>(load<T>(side.log_scaling + i), high);
  return min_lanes<T>(low) >= R::SCALING_LOW && max_lanes<T>(high) <= R::SCALING_HIGH;
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
    for_chunks(s.team, s.chunks.count, [&](int64_t chunk) { col_sums(s, s.chunks.begin(chunk), s.chunks.end(chunk)); });
    scaled = level_from_sums(s, s.cols, s.level, x);
  }
  if (!scaled) x = log_cols_level(s);
  const double moved = set_caps(s, s.cols, x);
  scaled = scale_to_caps(s, s.rows, s.level) && scaled;
  scaled = scale_to_caps(s, s.cols, 0.0) && scaled;
  if (scaled) {
    for_chunks(s.team, s.chunks.count, [&](int64_t chunk) {
      clear_lanes(s, chunk);
      row_sums(s, s.chunks.begin(chunk), s.chunks.end(chunk), lanes_of(s, chunk));
    });
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
