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
    this->settle();
    for (int64_t i = 0; i < n; ++i) sound = sound && finite(T(this->row_potential(i)));
    for (int64_t j = 0; j < m; ++j) sound = sound && finite(T(this->col_potential(j)));
  }

  // Close costs: K at f = low, g = 0 lies in [exp(-SCALING_HIGH), 1]. The row potential stays 0: only the first change is
  // measured against it.
  void start_close(double low) {
    for (int64_t i = 0; i < n; ++i) rows.reference[i] = T(low), rows.log_scaling[i] = 0;
    scaled = build_kernel(*this);
    for (int64_t i = 0; i < n; ++i) rows.log_scaling[i] = T(-double(T(low)) / eps);
    rows.by_ratio = false;
  }

  // ---- damped updates (balanced, KL) -----------------------------------------------------------------------------------

  struct Seen {  // ranges of a part of a half iteration
    Vec<T> sum_low, sum_high, log_low, log_high, change, ratio_low, ratio_high;
    void begin() {
      sum_low = sum_high = ratio_low = ratio_high = splat<T>(T(1));
      log_low = log_high = change = Vec<T>{};
    }
    void join(const Seen& other) {
      sum_low = vmin<T>(sum_low, other.sum_low), sum_high = vmax<T>(sum_high, other.sum_high);
      log_low = vmin<T>(log_low, other.log_low), log_high = vmax<T>(log_high, other.log_high);
      change = vmax<T>(change, other.change);
      ratio_low = vmin<T>(ratio_low, other.ratio_low), ratio_high = vmax<T>(ratio_high, other.ratio_high);
    }
    bool in_range() const { return min_lanes<T>(sum_low) >= R::SUM_LOW && max_lanes<T>(sum_high) <= R::SUM_HIGH; }
    // Whether a scaling has left its range: by its log, or by the sum that it is the inverse of.
    bool wide(bool by_ratio) const {
      if (by_ratio) return double(min_lanes<T>(sum_low)) < exp_of(-double(R::SCALING_HIGH));
      return !(min_lanes<T>(log_low) >= R::SCALING_LOW && max_lanes<T>(log_high) <= R::SCALING_HIGH);
    }
    double moved(bool by_ratio) const {
      if (!by_ratio) return double(max_lanes<T>(change));
      return larger(log_of(double(max_lanes<T>(ratio_high))), -log_of(double(min_lanes<T>(ratio_low))));
    }
  };

  // log scaling = damping - tau log sum, for entries [from, to).
  static void update_logs(const Side<T>& side, Seen& seen, int64_t from, int64_t to) {
    const Vec<T> tau = splat<T>(T(side.tau));
    Seen now = seen;
    for (int64_t i = from; i < to; i += LANES<T>) {
      const Vec<T> sum = load<T>(side.sum + i) + load<T>(side.pad + i);
      now.sum_low = vmin<T>(sum, now.sum_low), now.sum_high = vmax<T>(sum, now.sum_high);
      const Vec<T> l = load<T>(side.damping + i) - tau * vlog<T>(sum);
      now.log_low = vmin<T>(l, now.log_low), now.log_high = vmax<T>(l, now.log_high);
      now.change = vmax<T>(vabs<T>(l - load<T>(side.log_scaling + i)), now.change);
      store<T>(side.next + i, l);
    }
    seen = now;
    // A loop of its own: with half as long a chain of operations, twice as many entries are under way at a time.
    for (int64_t i = from; i < to; i += LANES<T>)
      store<T>(side.scaled_weight + i, load<T>(side.weight + i) * vexp<T>(load<T>(side.next + i)));
  }
  // Without damping scaling = 1 / sum, and sum times the last scaling is the ratio of the two: no log, no exp.
  static void update_ratios(const Side<T>& side, Seen& seen, int64_t from, int64_t to) {
    Seen now = seen;
    for (int64_t i = from; i < to; i += LANES<T>) {
      const Vec<T> sum = load<T>(side.sum + i) + load<T>(side.pad + i), ratio = sum * load<T>(side.scaling + i);
      now.sum_low = vmin<T>(sum, now.sum_low), now.sum_high = vmax<T>(sum, now.sum_high);
      now.ratio_low = vmin<T>(ratio, now.ratio_low), now.ratio_high = vmax<T>(ratio, now.ratio_high);
      const Vec<T> scaling = splat<T>(T(1)) / sum;
      store<T>(side.next + i, scaling), store<T>(side.scaled_weight + i, load<T>(side.weight + i) * scaling);
    }
    seen = now;
  }
  static void update(const Side<T>& side, Seen& seen, int64_t from, int64_t to) {
    side.by_ratio ? update_ratios(side, seen, from, to) : update_logs(side, seen, from, to);
  }
  // Rows from their sums.
  Seen scale_rows() {
    Seen seen;
    seen.begin();
    update(rows, seen, 0, rows.padded);
    return seen;
  }
  // Columns from K^T u a, and the next row sums in the same pass over K.
  Seen scale_cols() {
    constexpr int W = PANEL<T>;
    Seen seen[Chunks::MOST];
    for_chunks(this->team, this->chunks.count, [&](int64_t chunk) {
      clear_lanes(*this, chunk);
      seen[chunk].begin();
      const int64_t group = group_of(*this), end = this->chunks.end(chunk);
      for (int64_t first = this->chunks.begin(chunk); first < end; first += group) {
        const int64_t last = first + group < end ? first + group : end;
        col_sums(*this, first, last);
        update(cols, seen[chunk], first * W, last * W);
        row_sums(*this, first, last, lanes_of(*this, chunk));
      }
    });
    for (int64_t chunk = 1; chunk < this->chunks.count; ++chunk) seen[0].join(seen[chunk]);
    reduce_lanes(*this);
    return seen[0];
  }
  // One side: in the scaling domain if that is right, else in the log domain. Returns the largest change.
  double half_iteration(Side<T>& side, bool& trouble) {
    if (scaled) {
      const Seen seen = &side == &rows ? scale_rows() : scale_cols();
      if (seen.in_range()) {
        const bool by_ratio = side.by_ratio, wide = seen.wide(by_ratio);
        exchange(by_ratio ? side.scaling : side.log_scaling, side.next);
        side.stale = by_ratio;
        if (wide) trouble = true, scaled = absorb(*this);
        else if (side.tau == 1 && !by_ratio) side.weigh(), side.by_ratio = true;
        return seen.moved(by_ratio);
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
  void read_rows(double* x) {
    rows.settle();
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
