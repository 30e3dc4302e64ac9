// The only place for what is special to the device: warp and block reductions and the running log-sum-exp.
#pragma once
#include <cuda_runtime.h>

namespace pk {
namespace device {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

template <class T> __device__ inline T warp_max(T x) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    const T y = __shfl_xor_sync(ALL_LANES, x, offset);
    x = y > x ? y : x;
  }
  return x;
}
template <class T> __device__ inline T warp_sum(T x) {
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

// log sum exp of the values that were added. -inf adds nothing.
template <class T> struct LogSum {
  T top, sum;
  __device__ LogSum() : top(-INFINITY), sum(0) {}
  __device__ void add(T x) {
    if (x > top) {
      sum = sum * exp(top - x) + T(1);
      top = x;
    } else if (x > T(-INFINITY)) {
      sum += exp(x - top);
    }
  }
  __device__ void merge_warp() {
    const T all = warp_max(top);
    sum = all > T(-INFINITY) ? warp_sum(sum * exp(top - all)) : T(0);
    top = all;
  }
  __device__ T log_value() const { return top + log(sum); }
};

}  // namespace device
}  // namespace pk
