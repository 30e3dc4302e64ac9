// The kernel of two point clouds times a matrix: tiles of it are computed, used and forgotten.
//
//   out = (K * left right_factor^T) right,   K_ij = exp(row_i + col_j - cost_ij / epsilon)
//
// A block has 64 rows and up to 128 columns of the result, which stay in registers while it goes over all columns of K.
#include "host.h"
#include "matrix_tile.cuh"
#include "problem.cuh"

namespace pk {
namespace {

using namespace device;

constexpr int WIDTH = 128, SPAN = WIDTH / (SIDE / PATCH);  // columns of the result that a block and a thread have
constexpr int RIGHT_PITCH = WIDTH + 4;
constexpr float HIGHEST_EXPONENT = 80;  // reached only between a row and a column that both have no weight

struct Pieces {  // shared memory
  float *rows, *cols, *norms, *kernel, *right;
  __host__ __device__ size_t carve(unsigned char* memory) {
    Carver carver{memory};
    rows = carver.floats(DEPTH * SIDE_PITCH), cols = carver.floats(DEPTH * SIDE_PITCH), norms = carver.floats(2 * SIDE);
    kernel = carver.floats(SIDE * SIDE_PITCH), right = carver.floats(SIDE * RIGHT_PITCH);
    return carver.used;
  }
};

__global__ void __launch_bounds__(PRODUCT_THREADS) product_kernel(PointsProductTask<float> task) {
  PK_DYNAMIC_SHARED(memory);
  Pieces pieces;
  pieces.carve(memory);
  const MatrixTile tile{pieces.rows, pieces.cols};
  const int64_t N = task.rows, M = task.cols, D = task.dim, p = blockIdx.z;
  const int64_t first_row = int64_t(blockIdx.x) * SIDE, first_entry = int64_t(blockIdx.y) * WIDTH;
  const int thread = threadIdx.x, span = thread % (SIDE / PATCH) * SPAN;
  const float inverse_epsilon = float(1.0 / task.epsilon[p]);
  float out[PATCH][SPAN] = {};
  float row_exponent[PATCH];
#pragma unroll
  for (int r = 0; r < PATCH; ++r) {
    const int64_t i = first_row + tile.down + r;
    row_exponent[r] = i < N ? __ldg(task.row + p * N + i) : -INFINITY;
  }
  for (int64_t col = 0; col < M; col += SIDE) {
    float sums[PATCH][PATCH] = {}, squared = 0;
    tile.multiply(task.x, p * N * D, first_row, N, task.y, p * M * D, col, M, D, Storage::float32, sums, squared);
    if (thread < 2 * SIDE) pieces.norms[thread] = squared;
    for (int at = thread; at < SIDE * WIDTH; at += PRODUCT_THREADS) {
      const int64_t j = col + at / WIDTH, e = first_entry + at % WIDTH;
      const bool there = j < M && e < task.width;
      pieces.right[at / WIDTH * RIGHT_PITCH + at % WIDTH] = there ? __ldg(task.right + (p * M + j) * task.width + e) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < PATCH; ++c) {
      const int64_t j = col + tile.across + c;
      const float col_exponent = j < M ? __ldg(task.col + p * M + j) : -INFINITY;
#pragma unroll
      for (int r = 0; r < PATCH; ++r) {
        const float norms = pieces.norms[tile.down + r] + pieces.norms[SIDE + tile.across + c];
        const float cost = task.squared ? max(fmaf(-2.0f, sums[r][c], norms), 0.0f) : 1.0f - sums[r][c];
        const float x = fmaf(-cost, inverse_epsilon, row_exponent[r] + col_exponent);
        sums[r][c] = exp2_approx((x > HIGHEST_EXPONENT ? HIGHEST_EXPONENT : x) * LOG2_E);
      }
    }
    if (task.left != nullptr) {
      float factors[PATCH][PATCH] = {}, unused = 0;
      tile.multiply(task.left, p * N * task.factors, first_row, N, task.right_factor, p * M * task.factors, col, M, task.factors,
                    Storage::float32, factors, unused);
#pragma unroll
      for (int r = 0; r < PATCH; ++r)
#pragma unroll
        for (int c = 0; c < PATCH; ++c) sums[r][c] *= factors[r][c];
    }
#pragma unroll
    for (int c = 0; c < PATCH; ++c)
      *reinterpret_cast<float4*>(pieces.kernel + (tile.across + c) * SIDE_PITCH + tile.down) =
          make_float4(sums[0][c], sums[1][c], sums[2][c], sums[3][c]);
    __syncthreads();
#pragma unroll 4
    for (int j = 0; j < SIDE; ++j) {
      const float4 k = *reinterpret_cast<const float4*>(pieces.kernel + j * SIDE_PITCH + tile.down);
      const float from_row[PATCH] = {k.x, k.y, k.z, k.w};
#pragma unroll
      for (int s = 0; s < SPAN; s += 4) {
        const float4 y = *reinterpret_cast<const float4*>(pieces.right + j * RIGHT_PITCH + span + s);
#pragma unroll
        for (int r = 0; r < PATCH; ++r) {
          out[r][s] = fmaf(from_row[r], y.x, out[r][s]), out[r][s + 1] = fmaf(from_row[r], y.y, out[r][s + 1]);
          out[r][s + 2] = fmaf(from_row[r], y.z, out[r][s + 2]), out[r][s + 3] = fmaf(from_row[r], y.w, out[r][s + 3]);
        }
      }
    }
    __syncthreads();  // the tiles are overwritten
  }
#pragma unroll
  for (int r = 0; r < PATCH; ++r)
#pragma unroll
    for (int s = 0; s < SPAN; ++s) {
      const int64_t i = first_row + tile.down + r, e = first_entry + span + s;
      if (i < N && e < task.width) task.out[(p * N + i) * task.width + e] = out[r][s];
    }
}

}  // namespace

const char* cuda_points_product(const PointsProductTask<float>& task, const CudaCall& call) {
  if (task.problems * task.rows * task.width == 0) return nullptr;
  const int64_t widths = (task.width + WIDTH - 1) / WIDTH;
  if (task.problems > 65535 || widths > 65535) return "more than 65535 problems; use smaller batches";
  return on_device(call.device, [&] {
    alignas(16) static unsigned char nowhere[16];  // only counted
    const Launch where{dim3(unsigned((task.rows + SIDE - 1) / SIDE), unsigned(widths), unsigned(task.problems)), dim3(PRODUCT_THREADS),
                       Pieces().carve(nowhere), call.stream};
    return launch(product_kernel, where, task);
  });
}

}  // namespace pk
