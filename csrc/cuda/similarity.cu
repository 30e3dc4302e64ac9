// The semantic term of a layer: 1 - cosine between all text and all video features of every sample, one matrix product.
#include "host.h"
#include "matrix_tile.cuh"
#include "token_cost.cuh"

namespace pk {
namespace {

using namespace device;

__global__ void __launch_bounds__(PRODUCT_THREADS) similarity_kernel(CostTask<float> task, Storage storage, float* result) {
  PK_SHARED(float, text, DEPTH * SIDE_PITCH);
  PK_SHARED(float, video, DEPTH * SIDE_PITCH);
  PK_SHARED(float, norms, 2 * SIDE);  // of the text and of the video rows
  const int64_t N = task.rows, M = task.cols, D = task.dim, b = blockIdx.z;
  const int64_t row = int64_t(blockIdx.y) * SIDE, col = int64_t(blockIdx.x) * SIDE;
  const MatrixTile tile{text, video};
  float sums[PATCH][PATCH] = {}, squared = 0;
  tile.multiply(task.text, b * N * D, row, N, task.video, b * M * D, col, M, D, storage, sums, squared);
  if (tile.thread < 2 * SIDE) norms[tile.thread] = 1.0f / max(sqrtf(squared), 1e-12f);
  __syncthreads();
#pragma unroll
  for (int r = 0; r < PATCH; ++r)
#pragma unroll
    for (int c = 0; c < PATCH; ++c) {
      const int64_t i = row + tile.down + r, j = col + tile.across + c;
      if (i < N && j < M) result[(b * N + i) * M + j] = 1.0f - sums[r][c] * norms[tile.down + r] * norms[SIDE + tile.across + c];
    }
}

}  // namespace

cudaError_t similarity(const CostTask<float>& task, const CudaCall& call, float* result) {
  const auto tiles = [](int64_t count) { return unsigned((count + SIDE - 1) / SIDE); };
  if (task.samples > 65535 || task.rows > int64_t(65535) * SIDE) return cudaErrorInvalidConfiguration;
  const Launch where{dim3(tiles(task.cols), tiles(task.rows), unsigned(task.samples)), dim3(PRODUCT_THREADS), 0, call.stream};
  return launch(similarity_kernel, where, task, call.storage, result);
}

}  // namespace pk
