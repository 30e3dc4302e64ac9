// Problems with an exact transported mass: potentials are caps <= 0, and one level carries the multiplier of the mass.
#pragma once
#include "log_domain.h"

namespace {

// log sum_i w_i exp(soft_i)
template <class T> double log_total(const Side<T>& side) {
  double top = -1e300, sum = 0;
  for (int64_t i = 0; i < side.count; ++i)
    if (side.weight[i] > 0) top = larger(side.soft[i], top);
  for (int64_t i = 0; i < side.count; ++i)
    if (side.weight[i] > 0) sum += side.weight[i] * exp_of(side.soft[i] - top);
  return top + log_of(sum);
}

// Level and caps of one side from its log-sums: weights * min(1, exp(level / epsilon + soft)) must sum to the mass.
// Newton's method on a concave piecewise linear function of exp(level / epsilon): from the left it never overshoots.
// An entry counts as full from `slack` on: when the mass is exactly the weight of the fullest ones, rounding must not
// send the level to where the next, perhaps far, one fills up. Returns the largest change of a cap in units of epsilon.
template <class T> double saturate(State<T>& s, Side<T>& side) {
  const double slack = sizeof(T) == 4 ? 1e-6 : 1e-11;
  const T* w = side.weight;
  for (int64_t i = 0; i < side.count; ++i) s.sound = s.sound && finite(side.soft[i]);
  double x = s.level / s.eps;
  for (int attempt = 0; attempt < 200; ++attempt) {
    double full = 0, open = 0;
    for (int64_t i = 0; i < side.count; ++i) {
      if (!(w[i] > 0)) continue;
      if (x + side.soft[i] > slack) full += w[i];
      else open += w[i] * exp_of(x + side.soft[i]);
    }
    const double room = s.mass - full;
    if (!(room > 0) || !(open > 0)) {
      if (attempt > 0 && open <= 0) break;  // all are full, to rounding
      x = log_of(s.mass) - log_total(side);
      continue;
    }
    const double step = log_of(room / open);
    x += step;
    if (magnitude(step) < 1e-12) break;
  }
  double moved = 0;
  for (int64_t i = 0; i < side.count; ++i) {
    const double marginal = x + side.soft[i], cap = marginal > 0 ? -marginal * s.eps : 0.0;
    moved = larger(magnitude(cap - side.cap[i]) / s.eps, moved);
    side.cap[i] = cap;
  }
  s.level = x * s.eps;
  return moved;
}

// soft = log sum - (reference + offset) / epsilon; false if a sum has left the range. A sum that is too small is only
// known to be small: enough where its share of the weight is then nothing, for the entry stays open and its cap 0.
template <class T> bool soft_from_sums(State<T>& s, Side<T>& side, double offset) {
  using R = Traits<T>;
  for (int64_t i = 0; i < side.count; ++i) {
    if (!(side.sum[i] <= R::SUM_HIGH) || (side.sum[i] < R::SUM_LOW && side.log_scaling[i] > R::OPEN_HIGH)) return false;
    const double sum = larger(double(side.sum[i]), double(R::SUM_LOW));
    side.soft[i] = log_of(sum) - (double(side.reference[i]) + offset) / s.eps;
  }
  return true;
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

// Half iterations; the row potential carries the level. scaled: K fits the potentials, before and after. They return the
// largest change of a cap in units of epsilon.
template <class T> double mass_rows(State<T>& s, bool& scaled) {
  if (!scaled || !soft_from_sums(s, s.rows, 0.0)) log_rows(s), scaled = false;
  return saturate(s, s.rows);
}
template <class T> double mass_cols(State<T>& s, bool& scaled) {
  scaled = scale_to_caps(s, s.rows, s.level) && scaled;
  if (scaled)
    for (int64_t p = 0; p < s.panels; ++p) panel_col_sums(s, p);
  if (!scaled || !soft_from_sums(s, s.cols, s.level)) {
    log_cols(s), scaled = false;
    for (int64_t j = 0; j < s.m; ++j) s.cols.soft[j] -= s.level / s.eps;
  }
  const double moved = saturate(s, s.cols);
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
    log_cols(s), saturate(s, s.cols);
    scale_to_caps(s, s.cols, 0.0);
  }
  scale_to_caps(s, s.rows, s.level);
}

}  // namespace
