// Reductions over a warp and a block, and numbers as they lie in memory.
#pragma once
#include "device.cuh"

namespace pk {
namespace device {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> __device__ inline T warp_max(T x) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    const T y = __shfl_xor_sync(ALL_LANES, x, offset);
    x = y > x ? y : x;
  }
  return x;
}
template <class T> __device__ inline T warp_sum(T x) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
  return x;
}

// Reduce over the block; every thread gets the result. shared: one element a warp. All threads must call.
template <class T, bool MAX> __device__ inline T block_reduce(T x, T* shared) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  x = MAX ? warp_max(x) : warp_sum(x);
  __syncthreads();  // earlier readers of shared are done
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = shared[0];
  for (int w = 1; w < warps; ++w) x = MAX ? (shared[w] > x ? shared[w] : x) : x + shared[w];
  return x;
}

}  // namespace device
}  // namespace pk
