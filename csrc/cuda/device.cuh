// The only file that knows what executes the kernels: a GPU, or under PK_EMULATE the CPU (tests/emulator/emulator.h offers the
// same names). Kernels use these names and the CUDA that both know: threadIdx, blockIdx, blockDim, gridDim, __syncthreads,
// __syncwarp, __shfl_xor_sync, __ldg, float4, __half, __nv_bfloat16.
#pragma once
#ifdef PK_EMULATE
#include "emulator.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// Shared memory: `count` elements of a static array, or the dynamic shared memory of the launch, aligned to 128 bytes.
#define PK_SHARED(type, name, count) __shared__ type name[count]
#define PK_DYNAMIC_SHARED(name)                                \
  extern __shared__ __align__(128) unsigned char pk_dynamic[]; \
  unsigned char* const name = pk_dynamic

namespace pk {
namespace device {

// ---- thread block clusters: sm_90 and later; before, every block is a cluster of its own -----------------------------------

__device__ inline unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}
// Where block `rank` of the cluster keeps what this block keeps at `pointer`.
template <class T> __device__ inline T* cluster_map(T* pointer, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(pointer, rank);
#else
  return pointer;
#endif
}

// ---- blocks that meet in global memory --------------------------------------------------------------------------------------

__device__ inline void add_release(unsigned* counter, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
__device__ inline unsigned load_acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
// Inside a loop that waits for another block.
__device__ inline void relax() { __nanosleep(20); }

// ---- arithmetic -------------------------------------------------------------------------------------------------------------

__device__ inline float exp2_approx(float x) {  // 2 ulp; subnormal results are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float log2_approx(float x) {  // absolute error 2^-22 near 1, relative 2^-22 beyond; subnormal x is 0
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
}  // namespace device

// ---- the host's side ----------------------------------------------------------------------------------------------------------

struct Limits {        // of a device, as the launchers ask for them
  int compute_major, multiprocessors;
  int shared_block;    // bytes of shared memory that one block may have, after opting in
};

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  uintptr_t stream = 0;
  unsigned cluster = 1;      // blocks a cluster, along x
  bool cooperative = false;  // all blocks of the grid run at the same time
};

inline cudaError_t limits_of(int device, Limits& limits) {
  cudaError_t error = cudaDeviceGetAttribute(&limits.compute_major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limits.shared_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error;
}

inline cudaError_t clear(void* pointer, size_t bytes, uintptr_t stream) {
  return cudaMemsetAsync(pointer, 0, bytes, reinterpret_cast<cudaStream_t>(stream));
}

template <class... P, class... A> inline cudaError_t launch(void (*kernel)(P...), const Launch& where, A&&... arguments) {
  cudaError_t error = cudaSuccess;
  if (where.shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(where.shared_bytes));
  if (error == cudaSuccess && where.cluster > 8) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = where.grid, config.blockDim = where.block, config.dynamicSmemBytes = where.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(where.stream), config.attrs = attributes;
  if (where.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = where.cluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (where.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, P(arguments)...);
}

}  // namespace pk
#endif
