// Reductions over a warp and a block, and numbers as they lie in memory.
#pragma once
#include "../api.h"
#include "device.cuh"

namespace pk {
namespace device {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LN2 = 0.6931471805599453f, LOG2_E = 1.4426950408889634f;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Entry i of an array in a storage that is known at run time only, and writing it.
__device__ inline float load_stored(const void* array, Storage storage, int64_t i) {
  if (storage == Storage::float32) return __ldg(static_cast<const float*>(array) + i);
  if (storage == Storage::bfloat16) return to_float(static_cast<const __nv_bfloat16*>(array)[i]);
  return to_float(static_cast<const __half*>(array)[i]);
}
__device__ inline void store_rounded(void* array, Storage storage, int64_t i, float x) {
  if (storage == Storage::float32) static_cast<float*>(array)[i] = x;
  else if (storage == Storage::bfloat16) static_cast<__nv_bfloat16*>(array)[i] = __float2bfloat16_rn(x);
  else static_cast<__half*>(array)[i] = __float2half_rn(x);
}

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

// Sums over the lanes of 8 values each. Lane l returns the one of index l / 4.
__device__ inline float transpose_sum(const float (&x)[8]) {
  const int lane = threadIdx.x % WARP;
  const bool upper = lane & 16, middle = lane & 8, lower = lane & 4;
  float four[4], two[2];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float keep = upper ? x[4 + r] : x[r], give = upper ? x[r] : x[4 + r];
    four[r] = keep + __shfl_xor_sync(ALL_LANES, give, 16);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float keep = middle ? four[2 + r] : four[r], give = middle ? four[r] : four[2 + r];
    two[r] = keep + __shfl_xor_sync(ALL_LANES, give, 8);
  }
  float one = (lower ? two[1] : two[0]) + __shfl_xor_sync(ALL_LANES, lower ? two[0] : two[1], 4);
  one += __shfl_xor_sync(ALL_LANES, one, 2);
  return one + __shfl_xor_sync(ALL_LANES, one, 1);
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
