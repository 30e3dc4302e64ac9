// The solve of one problem between point clouds: one pass over the kernel an iteration where its range allows that, log-sums
// elsewhere. The iteration, its stop and its acceleration are those of `solver.h`.
#pragma once
#include "anderson.h"
#include "exact_mass.h"
#include "points_state.h"

namespace {

template <class T> struct PointSolver : PointState<T> {
  using Base = PointState<T>;
  using Base::rows, Base::cols, Base::eps, Base::sound;

  int iterations = 0;
  double residual = __builtin_inf();
  double level = 0, mass = 0;  // level: multiplier of the mass, in cost units
  bool exact_mass = false, accelerate = false;
  Anderson anderson;
  bool has_row_sums = false;   // rows.sum belongs to the column potentials
  int pause = 0, next_pause = 1;  // iterations by log-sums before one pass is tried again

  void solve(int max_iters, double tol, bool warm_rows, bool warm_cols) {
    // Caps have kinks, and an extrapolation across one can cost more than it gains: begin later, forgive no failure.
    if (accelerate) anderson.begin(exact_mass ? 10 : 1, !exact_mass);
    if (exact_mass) level = (warm_rows ? start_caps(rows) : 0.0) + (warm_cols ? start_caps(cols) : 0.0);
    if (warm_rows && !warm_cols) update_by_logs(rows, cols), commit(cols);
    while (iterations < max_iters && sound) {
      ++iterations;
      iterate(iterations == max_iters, tol);
      if (residual < tol) break;
    }
    if (exact_mass) split_level(rows), split_level(cols);
  }
  void split_level(PointSide<T>& side) {
    for (int64_t i = 0; i < side.cloud.count; ++i) side.potential[i] += level / 2;
    sound = sound && finite(T(level));
  }

  void iterate(bool last, double tol) {
    const double level_before = level;
    if (accelerate) read_rows(anderson.point);
    if (has_row_sums) this->damp(rows, 0, rows.padded);
    else update_by_logs(cols, rows);
    double moved = commit(rows);
    // The last iteration is a plain one: its residual is that of the potentials that are returned.
    if (accelerate && !last && !(double(T(moved)) < tol)) mix();
    const int result = !exact_mass && pause == 0 ? this->both_sides() : 0;
    has_row_sums = result == 2;
    if (result == 2) {
      next_pause = 1;
    } else if (pause > 0) {
      --pause;
    } else {
      pause = next_pause, next_pause = next_pause < 64 ? 2 * next_pause : 64;
    }
    if (result == 0) update_by_logs(rows, cols);
    moved = larger(commit(cols), moved);
    residual = double(T(larger(magnitude(level - level_before) / eps, moved)));  // what the caller sees is what is compared
  }

  // side.next from log-sums over the other side.
  void update_by_logs(PointSide<T>& over, PointSide<T>& side) {
    this->log_sums(over, side);
    if (!sound) return;
    if (exact_mass) {
      const double x = level_of(side);
      for (int64_t i = 0; i < side.cloud.count; ++i) {
        const double marginal = x + side.soft[i];
        side.next[i] = marginal > 0 ? -marginal * eps : 0.0;
      }
      level = x * eps;
    } else {
      for (int64_t i = 0; i < side.cloud.count; ++i) side.next[i] = -eps * side.tau * side.soft[i];
    }
  }
  // Take the next potentials. Returns the largest change in units of epsilon.
  double commit(PointSide<T>& side) {
    double moved = 0;
    for (int64_t i = 0; i < side.cloud.count; ++i) {
      moved = larger(magnitude(side.next[i] - side.potential[i]), moved);
      sound = sound && finite(T(side.next[i]));
      side.potential[i] = side.next[i];
    }
    return moved / eps;
  }

  // ---- exact mass -----------------------------------------------------------------------------------------------------

  // Caps from given potentials, whose largest one is its side's half of the level.
  static double start_caps(PointSide<T>& side) {
    double top = -1e300;
    for (int64_t i = 0; i < side.cloud.count; ++i) top = larger(side.potential[i], top);
    for (int64_t i = 0; i < side.cloud.count; ++i) side.potential[i] -= top;
    return top;
  }
  // By `find_level`, which gets what it reads; the next caps are not there yet, their memory is free.
  double level_of(PointSide<T>& side) const {
    State<T> state{};
    Side<T> view{};
    state.mass = mass, state.level = level, state.eps = eps;
    view.count = side.cloud.count, view.padded = side.padded, view.soft = side.soft, view.mass_weight = side.weight;
    view.open = side.next;
    return find_level(state, view);
  }

  // ---- acceleration ---------------------------------------------------------------------------------------------------

  // The row potentials in units of epsilon (exact mass: the caps) are the state that is accelerated.
  void read_rows(double* x) const {
    for (int64_t i = 0; i < rows.cloud.count; ++i) x[i] = rows.potential[i] / eps;
  }
  void mix() {
    read_rows(anderson.image);
    if (!anderson.mix(Traits<T>::RESIDUAL_FLOOR)) return;
    for (int64_t i = 0; i < rows.cloud.count; ++i) {
      const double x = anderson.image[i] * eps;
      rows.potential[i] = exact_mass && x > 0 ? 0.0 : x;
    }
  }
};

}  // namespace
