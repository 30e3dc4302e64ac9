// Cholesky factors of small symmetric matrices, in float64.
#pragma once
#include "state.h"

namespace {

// Lower triangle of a positive definite matrix [n, stride] -> its Cholesky factor, with the inverse of the diagonal on the
// diagonal. A pivot that is nothing but rounding becomes 0, and the solution is 0 in its place.
inline void cholesky(double* A, int64_t n, int64_t stride) {
  constexpr int VL = LANES<double>;
  using V = Vec<double>;
  for (int64_t first = 0; first < n; first += 4) {  // four rows at a time share the loads of the finished ones
    const int64_t height = n - first < 4 ? n - first : 4;
    double *row[4], before[4];
    for (int64_t r = 0; r < 4; ++r) {
      row[r] = A + (first + (r < height ? r : 0)) * stride;
      before[r] = row[r][first + (r < height ? r : 0)];
    }
    for (int64_t j = 0; j < first; ++j) {
      const double* other = A + j * stride;
      V sums[4] = {};
      int64_t k = 0;
      for (; k + VL <= j; k += VL) {
        const V x = load<double>(other + k);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) sums[r] += x * load<double>(row[r] + k);
      }
      for (int64_t r = 0; r < height; ++r) {
        double sum = sum_lanes<double>(sums[r]);
        for (int64_t rest = k; rest < j; ++rest) sum += other[rest] * row[r][rest];
        row[r][j] = (row[r][j] - sum) * other[j];
      }
    }
    for (int64_t r = 0; r < height; ++r)
      for (int64_t j = first; j <= first + r; ++j) {
        const double* other = A + j * stride;
        double left = row[r][j];
        for (int64_t k = 0; k < j; ++k) left -= other[k] * row[r][k];
        if (j < first + r) row[r][j] = left * other[j];
        else row[r][j] = left > 1e-15 * before[r] ? 1 / __builtin_sqrt(left) : 0.0;
      }
  }
}

// Solve with that factor, in place.
inline void cholesky_solve(const double* L, int64_t n, int64_t stride, double* x) {
  for (int64_t i = 0; i < n; ++i) {
    double left = x[i];
    for (int64_t k = 0; k < i; ++k) left -= L[i * stride + k] * x[k];
    x[i] = left * L[i * stride + i];
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    x[i] *= L[i * stride + i];
    for (int64_t k = 0; k < i; ++k) x[k] -= L[i * stride + k] * x[i];
  }
}

}  // namespace
