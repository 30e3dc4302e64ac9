// The density exp((f_i + g_j - C_ij) / epsilon) of a solved problem, and the plan a_i density_ij b_j, tile by tile.
#pragma once
#include "numerics.cuh"

namespace pk {
namespace device {

constexpr float DENSITY_CEILING = 40;  // natural exponents where the density is multiplied by a weight of zero

// One entry: x is the natural exponent. What is masked has a density of 0 and the cost 0.
struct Entry {
  float cost, x, density;
};

// A column of a batch's problem p, and its entries row by row.
struct SolvedColumn {
  const Solved<float>& problem;
  Storage storage;
  int64_t p, j;
  bool exists;
  float g, b, inverse_epsilon;

  __device__ SolvedColumn(const Solved<float>& problem_, Storage storage_, int64_t p_, int64_t j_)
      : problem(problem_), storage(storage_), p(p_), j(j_) {
    exists = j < problem.cols && (problem.col_mask == nullptr || problem.col_mask[p * problem.cols + j]);
    g = exists ? __ldg(problem.g + p * problem.cols + j) : 0.0f, b = exists ? __ldg(problem.b + p * problem.cols + j) : 0.0f;
    inverse_epsilon = float(1.0 / problem.epsilon[p]);
  }
  __device__ bool row_exists(int64_t i) const {
    return i < problem.rows && (problem.row_mask == nullptr || problem.row_mask[p * problem.rows + i]);
  }
  __device__ int64_t at(int64_t i) const { return (p * problem.rows + i) * problem.cols + j; }
  __device__ float row_weight(int64_t i) const { return __ldg(problem.a + p * problem.rows + i); }
  // Row i exists.
  __device__ Entry entry(int64_t i) const {
    if (!exists) return {0.0f, 0.0f, 0.0f};
    const float cost = load_stored(problem.cost, storage, at(i));
    float x = ((__ldg(problem.f + p * problem.rows + i) + g) - cost) * inverse_epsilon;
    if (!(row_weight(i) > 0 && b > 0) && x > DENSITY_CEILING) x = DENSITY_CEILING;
    return {cost, x, exp2_approx(x * LOG2_E)};
  }
};

// How [problems, rows, cols] are divided into blocks of so many rows and columns.
struct Tiling {
  int64_t problems, row_tiles, col_tiles;
  Tiling(int64_t problems_, int64_t rows, int64_t cols, int tile_rows, int tile_cols)
      : problems(problems_), row_tiles((rows + tile_rows - 1) / tile_rows), col_tiles((cols + tile_cols - 1) / tile_cols) {}
  __host__ __device__ int64_t count() const { return problems * row_tiles * col_tiles; }
  __device__ int64_t problem(int64_t tile) const { return tile / (row_tiles * col_tiles); }
  __device__ int64_t row_tile(int64_t tile) const { return tile / col_tiles % row_tiles; }
  __device__ int64_t col_tile(int64_t tile) const { return tile % col_tiles; }
};

}  // namespace device
}  // namespace pk
