// Solves one problem: scaling iterations without exponentials where the range allows them, new references when scalings
// grow large, and log-domain half iterations where nothing else is right. Anderson acceleration on request.
#pragma once
#include "anderson.h"
#include "exact_mass.h"

namespace {

template <class T> struct Solver : State<T> {
  using R = Traits<T>;
  using State<T>::rows, State<T>::cols, State<T>::n, State<T>::m, State<T>::eps, State<T>::level, State<T>::exact_mass,
      State<T>::sound;

  int iterations = 0;
  double residual = __builtin_inf();
  bool accelerate = false;  // by `anderson`, which then has its layout
  Anderson anderson;
  bool scaled;             // K and the row sums fit the potentials
  int failures, log_left;  // in a row; log-domain iterations before K is tried again

  // Iterate until the residual is below tol. low, high: range of C. A warm side's reference holds its potential.
  void solve(double low, double high, int max_iters, double tol, bool warm_rows, bool warm_cols) {
    scaled = false, failures = 0, log_left = 0;
    // Caps have kinks, and an extrapolation across one can cost more than it gains: begin later, forgive no failure.
    if (accelerate) anderson.begin(exact_mass ? 10 : 1, !exact_mass);
    if (exact_mass) {
      start_mass(*this, warm_rows, warm_cols);
    } else if (warm_rows && !warm_cols) {
      log_cols(*this), set_from_soft(*this, cols);
    }
    if (!warm_rows && !warm_cols && (high - low) / eps <= double(R::SCALING_HIGH)) start_close(low);
    while (iterations < max_iters) {
      ++iterations;
      iterate(iterations == max_iters, tol);
      if (residual < tol || !sound) break;
    }
    if (exact_mass) {
      scale_to_caps(*this, rows, level / 2), scale_to_caps(*this, cols, level / 2);
      scaled = false;
    }
    for (int64_t i = 0; i < n; ++i) sound = sound && finite(T(this->row_potential(i)));
    for (int64_t j = 0; j < m; ++j) sound = sound && finite(T(this->col_potential(j)));
  }

  // Close costs: K at f = low, g = 0 lies in [exp(-SCALING_HIGH), 1]. The row potential stays 0: only the first change is
  // measured against it.
  void start_close(double low) {
    for (int64_t i = 0; i < n; ++i) rows.reference[i] = T(low), rows.log_scaling[i] = 0;
    scaled = build_kernel(*this);
    for (int64_t i = 0; i < n; ++i) rows.log_scaling[i] = T(-double(T(low)) / eps);
  }

  // ---- damped updates (balanced, KL) -----------------------------------------------------------------------------------

  struct Seen {  // ranges of one half iteration; reach: distance of the logs from the middle of their range
    static constexpr T MIDDLE = (R::SCALING_LOW + R::SCALING_HIGH) / 2;
    Vec<T> sum_low = splat<T>(T(1)), sum_high = splat<T>(T(1)), reach{}, change{};
    bool in_range() const { return min_lanes<T>(sum_low) >= R::SUM_LOW && max_lanes<T>(sum_high) <= R::SUM_HIGH; }
    bool wide() const { return !(max_lanes<T>(reach) <= R::SCALING_HIGH - MIDDLE); }
  };

  // log scaling = damping - tau log sum, for entries [from, to).
  static void update(Side<T>& side, Seen& seen, int64_t from, int64_t to) {
    const Vec<T> tau = splat<T>(T(side.tau));
    for (int64_t i = from; i < to; i += LANES<T>) {
      const Vec<T> sum = load<T>(side.sum + i) + load<T>(side.pad + i);
      seen.sum_low = vmin<T>(sum, seen.sum_low), seen.sum_high = vmax<T>(sum, seen.sum_high);
      const Vec<T> l = load<T>(side.damping + i) - tau * vlog<T>(sum);
      seen.reach = vmax<T>(vabs<T>(l - splat<T>(Seen::MIDDLE)), seen.reach);
      seen.change = vmax<T>(vabs<T>(l - load<T>(side.log_scaling + i)), seen.change);
      store<T>(side.next + i, l);
      store<T>(side.scaled_weight + i, load<T>(side.weight + i) * vexp<T>(l));
    }
  }
  // Rows from their sums.
  Seen scale_rows() {
    Seen seen;
    update(rows, seen, 0, rows.padded);
    return seen;
  }
  // Columns from K^T u a, and the next row sums in the same pass over K.
  Seen scale_cols() {
    Seen seen;
    clear_lanes(*this);
    const int64_t panel_bytes = n * PANEL<T> * int64_t(sizeof(T));
    int64_t group = 24 * 1024 / panel_bytes;  // panels that stay in the first-level cache between the two halves
    group = group < 1 ? 1 : (group > 8 ? 8 : group);
    for (int64_t first = 0; first < this->panels; first += group) {
      const int64_t last = first + group < this->panels ? first + group : this->panels;
      for (int64_t p = first; p < last; ++p) panel_col_sums(*this, p);
      update(cols, seen, first * PANEL<T>, last * PANEL<T>);
      for (int64_t p = first; p < last; ++p) panel_row_sums(*this, p);
    }
    reduce_lanes(*this);
    return seen;
  }
  // One side: in the scaling domain if that is right, else in the log domain. Returns the largest change.
  double half_iteration(Side<T>& side, bool& trouble) {
    if (scaled) {
      const Seen seen = &side == &rows ? scale_rows() : scale_cols();
      if (seen.in_range()) {
        exchange(side.log_scaling, side.next);
        if (seen.wide()) trouble = true, scaled = absorb(*this);
        return double(max_lanes<T>(seen.change));
      }
    }
    if (&side == &rows) log_rows(*this);
    else log_cols(*this);
    const double moved = set_from_soft(*this, side);
    if (scaled) trouble = true, scaled = absorb(*this);
    return moved;
  }
  // One iteration, f then g. After steps that the scaling domain cannot represent, log-domain iterations take over for a
  // while: twice as many after each failure, up to 64.
  void iterate(bool last, double tol) {
    const bool was_scaled = scaled;
    bool trouble = false;
    const double level_before = level;
    if (accelerate) read_rows(anderson.point);
    double moved = exact_mass ? mass_rows(*this, scaled) : half_iteration(rows, trouble);
    // The last iteration is a plain one: its residual is that of the potentials that are returned.
    if (accelerate && !last && !(double(T(moved)) < tol)) mix(trouble);
    if (exact_mass) {
      moved = larger(mass_cols(*this, scaled), moved);
      moved = larger(magnitude(level - level_before) / eps, moved);
      trouble = was_scaled && !scaled;
    } else {
      moved = larger(half_iteration(cols, trouble), moved);
    }
    residual = double(T(moved));  // what the caller sees is what is compared
    if (was_scaled && !trouble) {
      failures = 0;
      // Slow convergence adds up the rounding of the scalings' logs: with new references they are small again.
      if (iterations >= 128 && (iterations & (iterations - 1)) == 0) scaled = absorb(*this);
      return;
    }
    if (!was_scaled && --log_left > 0) return;
    if (!scaled) scaled = absorb(*this);
    if ((trouble || !scaled) && ++failures >= 2) log_left = 1 << (failures < 8 ? failures - 2 : 6), scaled = false;
  }

  // The row potentials in units of epsilon (exact mass: the caps) are the state that is accelerated.
  void read_rows(double* x) const {
    for (int64_t i = 0; i < n; ++i) x[i] = (exact_mass ? rows.cap[i] : this->row_potential(i)) / eps;
  }
  // Take the accelerated row potentials in place of the plain ones, if there are any.
  void mix(bool& trouble) {
    read_rows(anderson.image);
    if (!anderson.mix(R::RESIDUAL_FLOOR)) return;
    if (exact_mass) {
      for (int64_t i = 0; i < n; ++i) rows.cap[i] = anderson.image[i] < 0 ? anderson.image[i] * eps : 0.0;
      return;
    }
    bool in_range = true;
    for (int64_t i = 0; i < n; ++i) {
      const double potential = anderson.image[i] * eps;
      if (scaled) {
        const T l = T((potential - double(rows.reference[i])) / eps);
        rows.log_scaling[i] = l, in_range = in_range && l >= R::SCALING_LOW && l <= R::SCALING_HIGH;
      } else {
        this->split(rows, i, potential, potential);
      }
    }
    if (!scaled) return;
    rows.weigh();
    if (!in_range) trouble = true, scaled = absorb(*this);
  }

  // Make K fit for plan rows scaled to sum 1, in which f cancels: where a row has left the range (strong damping), f of
  // an undamped half step takes its place and what is missing goes into a u.
  void prepare_rows() {
    bool in_range = scaled || absorb(*this);
    for (int64_t i = 0; i < n; ++i) in_range = in_range && rows.sum[i] >= R::SUM_LOW && rows.sum[i] <= R::SUM_HIGH;
    if (in_range) return;
    log_rows(*this);
    for (int64_t i = 0; i < n; ++i) {
      rows.cap[i] = this->row_potential(i) / eps + rows.soft[i];
      this->split(rows, i, -eps * rows.soft[i], -eps * rows.soft[i]);
    }
    build_kernel(*this);
    for (int64_t i = 0; i < n; ++i)
      rows.scaled_weight[i] = rows.weight[i] * T(exp_of(rows.cap[i] + double(rows.log_scaling[i])));
  }
};

}  // namespace
