// Anderson acceleration of a fixed-point iteration x <- T(x), with a safeguard that returns to plain steps.
//
// With the differences dX, dR of the last points and residuals r = T(x) - x, the next point is T(x) - (dX + dR) gamma,
// gamma = argmin |r - dR gamma| (type II of Walker and Ni 2011). The safeguard is this library's:
// - the step away from T(x) is no longer than the way from the oldest kept point to T(x);
// - where max |r| has not decreased at such a point, the T(x) it started from takes its place, the history is dropped and
//   extrapolation pauses for 2, 4, 8, ... iterations; a success makes the next pause 2 again, if `forgiving`.
#pragma once
#include "state.h"

namespace {

struct Anderson {
  using V = Vec<double>;
  static constexpr int DEPTH = 5;
  // Fewest rows and columns: about as many differences as unknowns fit any residual, and lead anywhere.
  static constexpr int64_t LEAST = 8;
  static constexpr double RIDGE = 1e-10;  // Tikhonov term of the least squares, relative to the trace

  int64_t size;           // padded; padding is 0 everywhere
  double *point, *image;  // x and T(x) of this iteration: `mix` puts the next point into image
  double *last_point, *last_residual, *residual, *fallback, *step;
  double *moves[DEPTH], *changes[DEPTH];  // dX, dR
  double gram[DEPTH][DEPTH];              // dR^T dR
  int kept, slot;                         // differences in use, and where the next one goes
  bool has_last, extrapolated, forgiving;
  int64_t pause, next_pause;  // iterations before the next extrapolation
  double before;              // max |r| before the last extrapolation

  void layout(Arena& arena, int64_t count) {
    size = round_up(count, LANES<double>);
    double** pieces[] = {&point, &image, &last_point, &last_residual, &residual, &fallback, &step};
    for (double** piece : pieces) *piece = arena.take<double>(size);
    for (int k = 0; k < DEPTH; ++k) moves[k] = arena.take<double>(size), changes[k] = arena.take<double>(size);
  }
  void begin(int first_pause, bool forgive) {
    double* padded[] = {point, last_point, image};
    for (double* x : padded) memset(x, 0, size_t(size) * sizeof(double));
    forget();
    extrapolated = false, forgiving = forgive, pause = first_pause, next_pause = 2;
  }
  void forget() { kept = slot = 0, has_last = false; }

  // Replace T(x) by the next point where it is another one. Returns whether it is. Residuals up to `floor` are rounding.
  bool mix(double floor) {
    double largest = 0;
    for (int64_t i = 0; i < size; ++i) {
      residual[i] = image[i] - point[i];
      largest = larger(magnitude(residual[i]), largest);
    }
    if (extrapolated) {
      extrapolated = false;
      if (!(largest < before)) {
        pause = next_pause, next_pause *= 2;
        forget();
        memcpy(image, fallback, size_t(size) * sizeof(double));
        return true;
      }
      if (forgiving) next_pause = 2;
    }
    if (has_last) remember();
    exchange(point, last_point), exchange(residual, last_residual);
    has_last = true;
    if (pause > 0) --pause;
    if (pause > 0 || kept == 0 || !(largest > floor) || !extrapolate()) return false;
    extrapolated = true, before = largest;
    return true;
  }

  void remember() {
    for (int64_t i = 0; i < size; ++i) {
      moves[slot][i] = point[i] - last_point[i];
      changes[slot][i] = residual[i] - last_residual[i];
    }
    if (kept < DEPTH) ++kept;
    for (int k = 0; k < kept; ++k) gram[k][slot] = gram[slot][k] = dot(changes[k], changes[slot]);
    slot = (slot + 1) % DEPTH;
  }

  // From the newest pair, which is the last one here. False if the least squares have no finite solution.
  bool extrapolate() {
    double gamma[DEPTH];
    if (!solve(gamma)) return false;
    memcpy(fallback, image, size_t(size) * sizeof(double));
    double length = 0, way = 0;
    for (int64_t i = 0; i < size; ++i) {
      double s = 0, w = last_residual[i];
      for (int k = 0; k < kept; ++k) s -= gamma[k] * (moves[k][i] + changes[k][i]), w += moves[k][i];
      step[i] = s;
      length = larger(magnitude(s), length), way = larger(magnitude(w), way);
    }
    const double share = length > way ? way / length : 1.0;
    for (int64_t i = 0; i < size; ++i) image[i] += share * step[i];
    return true;
  }

  // gamma by the Cholesky factor of dR^T dR, its columns scaled to length 1: the newest are by far the shortest.
  bool solve(double* gamma) const {
    double scale[DEPTH], factor[DEPTH][DEPTH];
    for (int i = 0; i < kept; ++i) {
      scale[i] = gram[i][i] > 0 ? 1 / __builtin_sqrt(gram[i][i]) : 0.0;
      gamma[i] = scale[i] * dot(changes[i], last_residual);
    }
    for (int i = 0; i < kept; ++i) {
      for (int j = 0; j <= i; ++j) {
        double sum = gram[i][j] * scale[i] * scale[j] + (i == j ? RIDGE * kept : 0.0);
        for (int k = 0; k < j; ++k) sum -= factor[i][k] * factor[j][k];
        factor[i][j] = i == j ? __builtin_sqrt(sum) : sum / factor[j][j];
      }
      for (int k = 0; k < i; ++k) gamma[i] -= factor[i][k] * gamma[k];
      gamma[i] /= factor[i][i];
    }
    bool sound = true;
    for (int i = kept - 1; i >= 0; --i) {
      for (int k = i + 1; k < kept; ++k) gamma[i] -= factor[k][i] * gamma[k];
      gamma[i] /= factor[i][i];
      sound = sound && finite(gamma[i]);
    }
    for (int i = 0; i < kept; ++i) gamma[i] *= scale[i];
    return sound;
  }
  double dot(const double* x, const double* y) const {
    V even{}, odd{};  // two chains hide the latency of the additions
    int64_t i = 0;
    for (; i + 2 * LANES<double> <= size; i += 2 * LANES<double>) {
      even += load<double>(x + i) * load<double>(y + i);
      odd += load<double>(x + i + LANES<double>) * load<double>(y + i + LANES<double>);
    }
    if (i < size) even += load<double>(x + i) * load<double>(y + i);
    return sum_lanes<double>(even + odd);
  }
};

}  // namespace
