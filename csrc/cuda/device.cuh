// The only file that knows what executes the kernels: a GPU, or under PK_EMULATE the CPU (tests/emulator/emulator.h offers the
// same names). Kernels use these names and the CUDA that both know: threadIdx, blockIdx, blockDim, gridDim, __syncthreads,
// __syncwarp, __shfl_xor_sync, __ballot_sync, __popc, __ldg, atomicMax, atomicOr, float4, __half, __nv_bfloat16.
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
#define PK_SHARED(type, name, count) __shared__ __align__(16) type name[count]
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
// Orders what this thread, and those that it has met at a barrier, wrote before with what is read after. Returns the value before.
__device__ inline unsigned arrive(unsigned* counter) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
// Inside a loop that waits for another block.
__device__ inline void relax() { __nanosleep(20); }

// ---- copies from global to shared memory that the threads do not wait for ----------------------------------------------------

template <int BYTES> __device__ inline void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES) : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most PENDING of this thread's groups are under way. Other threads see the data after a barrier.
template <int PENDING> __device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

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
__device__ inline float reciprocal_approx(float x) {  // 1 ulp; an exact division is a call, and spills
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float sqrt_approx(float x) {  // 1 ulp
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- tensor cores: one warp, fragments as in the PTX manual ------------------------------------------------------------------

__device__ inline uint32_t to_tf32(float x) {  // rounded to nearest, ties away from zero
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
// d += a b: a is 16 x 8, b is 8 x 8, d is 16 x 8. All 32 lanes must call.
__device__ inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same with a 16 x 16, b 16 x 8, two bf16 a register, the one of the lower index in the lower half.
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. All 32 lanes must call.
__device__ inline void load_matrices(uint32_t (&d)[4], const void* shared_row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(from)
               : "memory");
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
  if (error == cudaSuccess && where.cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
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
