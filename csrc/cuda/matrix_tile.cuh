// A tile of 64 x 64 dot products in float32, 4 x 4 of them a thread, and the squared norms of its rows and columns.
#pragma once
#include "numerics.cuh"

namespace pk {
namespace device {

constexpr int SIDE = 64, DEPTH = 16, PRODUCT_THREADS = 256, PATCH = 4;
constexpr int SIDE_PITCH = SIDE + 4;  // keeps float4 aligned; a column of the transposed tile spreads over the banks

struct MatrixTile {
  float *rows, *cols;  // shared: [DEPTH, SIDE_PITCH] each, transposed: a thread's four of each are one 16-byte load
  int thread = threadIdx.x, across = thread % (SIDE / PATCH) * PATCH, down = thread / (SIDE / PATCH) * PATCH;

  // features [.., dim] from entry `base` on, rows [first, count).
  __device__ void fetch(float* to, const void* features, Storage storage, int64_t base, int64_t first, int64_t count, int64_t k,
                        int64_t dim) const {
#pragma unroll
    for (int step = 0; step < SIDE * DEPTH; step += PRODUCT_THREADS) {
      const int i = (step + thread) / DEPTH, d = (step + thread) % DEPTH;
      const bool there = first + i < count && k + d < dim;
      to[d * SIDE_PITCH + i] = there ? load_stored(features, storage, base + (first + i) * dim + k + d) : 0.0f;
    }
  }
  // sums += products of rows [row, ..) of the left features and [col, ..) of the right ones; squared: of row `thread` of the left
  // tile, or of column `thread - SIDE`. All threads.
  __device__ void multiply(const void* left, int64_t left_base, int64_t row, int64_t left_count, const void* right,
                           int64_t right_base, int64_t col, int64_t right_count, int64_t dim, Storage storage,
                           float (&sums)[PATCH][PATCH], float& squared) const {
    for (int64_t k = 0; k < dim; k += DEPTH) {
      fetch(rows, left, storage, left_base, row, left_count, k, dim);
      fetch(cols, right, storage, right_base, col, right_count, k, dim);
      __syncthreads();
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        const float4 x = *reinterpret_cast<const float4*>(rows + d * SIDE_PITCH + down);
        const float4 y = *reinterpret_cast<const float4*>(cols + d * SIDE_PITCH + across);
        const float from_row[PATCH] = {x.x, x.y, x.z, x.w}, from_col[PATCH] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int r = 0; r < PATCH; ++r)
#pragma unroll
          for (int c = 0; c < PATCH; ++c) sums[r][c] = fmaf(from_row[r], from_col[c], sums[r][c]);
      }
      if (thread < 2 * SIDE) {
        const float* const own = (thread < SIDE ? rows : cols) + thread % SIDE;
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) squared = fmaf(own[d * SIDE_PITCH], own[d * SIDE_PITCH], squared);
      }
      __syncthreads();
    }
  }
};

}  // namespace device
}  // namespace pk
