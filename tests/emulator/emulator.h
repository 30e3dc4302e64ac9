// CUDA for kernels that run on the CPU: what csrc/cuda/device.cuh offers and the builtins that it names. For tests only.
//
// Every CUDA thread is a fiber. They are switched at barriers and warp functions, in an order drawn from PK_SEED. Shared memory
// has its exact size and starts as NaN.  What a GPU would leave undefined
// ends the program with status 66: barriers that not all threads reach, lanes outside of a mask, blocks that wait for ever.
// PK_DEVICE names the device: sm_90, sm_80, or with little shared memory, which small problems do not fit: small, tiny and tiny_80.
#pragma once
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#undef __launch_bounds__
#undef __grid_constant__
#define __grid_constant__
#define __launch_bounds__(...)

namespace pk {
namespace emulator {

struct Thread {
  uint3 index, block;
  dim3 block_dim, grid_dim;
  int linear, lane, warp;
};
extern Thread* current;

struct Place {  // in the source, for messages
  const char* file;
  int line;
};

void block_barrier(Place place);
void cluster_barrier(Place place);
// Wait for the lanes of mask; all: room for what each of the 32 lanes brought.
void warp_gather(unsigned mask, const void* mine, size_t bytes, void* all, bool orders_memory, Place place);
void* static_shared(const void* key, size_t bytes);
unsigned char* dynamic_shared();
void* map_shared(void* pointer, unsigned rank);
unsigned cluster_rank();
void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(int pending);
void release(const void* counter);
void acquire(const void* counter);
void wait_a_little();
[[noreturn]] void fail(Place place, const char* format, ...);

}  // namespace emulator
}  // namespace pk

#define threadIdx (pk::emulator::current->index)
#define blockIdx (pk::emulator::current->block)
#define blockDim (pk::emulator::current->block_dim)
#define gridDim (pk::emulator::current->grid_dim)

#define PK_SHARED(type, name, count)   \
  static const char name##_key = 0;    \
  type(&name)[count] = *reinterpret_cast<type(*)[count]>( \
      pk::emulator::static_shared(&name##_key, sizeof(type) * (count)))
#define PK_DYNAMIC_SHARED(name) unsigned char* const name = pk::emulator::dynamic_shared()
#define PK_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- CUDA's builtins ----------------------------------------------------------------------------------------------------------

inline void __syncthreads(PK_HERE) { pk::emulator::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, PK_HERE) {
  char mine = 0, all[32];
  pk::emulator::warp_gather(mask, &mine, 1, all, true, {file, line});
}
namespace pk {
namespace emulator {
template <class T> inline T shuffle(unsigned mask, T value, int from, Place place) {
  T all[32];
  warp_gather(mask, &value, sizeof(T), all, false, place);
  if (!(mask >> from & 1)) fail(place, "lane %d reads lane %d, which is not in the mask %08x", current->lane, from, mask);
  return all[from];
}
}  // namespace emulator
}  // namespace pk
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, PK_HERE) {
  const int lane = pk::emulator::current->lane, from = lane ^ bits;
  return pk::emulator::shuffle(mask, value, from / width == lane / width ? from : lane, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, bool mine, PK_HERE) {
  bool all[32];
  pk::emulator::warp_gather(mask, &mine, sizeof mine, all, false, {file, line});
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= unsigned((mask >> lane & 1) && all[lane]) << lane;
  return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T> inline T __ldg(const T* pointer) { return *pointer; }
// Monotone: the result does not depend on the order.
inline int atomicMax(int* pointer, int value) {
  int before = __atomic_load_n(pointer, __ATOMIC_RELAXED);
  while (before < value && !__atomic_compare_exchange_n(pointer, &before, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}
inline int atomicOr(int* pointer, int value) { return __atomic_fetch_or(pointer, value, __ATOMIC_RELAXED); }
inline float __uint_as_float(unsigned x) {
  float y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline float __fmul_rn(float x, float y) { return x * y; }
inline int __float_as_int(float x) {
  int y;
  memcpy(&y, &x, sizeof y);
  return y;
}
template <class A, class B> inline std::common_type_t<A, B> max(A x, B y) { return x > y ? x : y; }
template <class A, class B> inline std::common_type_t<A, B> min(A x, B y) { return x < y ? x : y; }
using std::isfinite;

// ---- csrc/cuda/device.cuh ------------------------------------------------------------------------------------------------------

namespace pk {
namespace device {

inline unsigned cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_sync(PK_HERE) { emulator::cluster_barrier({file, line}); }
template <class T> inline T* cluster_map(T* pointer, unsigned rank) {
  using Plain = std::remove_const_t<T>;
  return static_cast<T*>(emulator::map_shared(const_cast<Plain*>(pointer), rank));
}
inline void add_release(unsigned* counter, unsigned value) {
  emulator::release(counter);
  __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}
inline unsigned arrive(unsigned* counter) {
  emulator::release(counter);
  const unsigned before = __atomic_fetch_add(counter, 1u, __ATOMIC_RELAXED);
  emulator::acquire(counter);
  return before;
}
inline unsigned load_acquire(const unsigned* counter) {
  const unsigned value = __atomic_load_n(counter, __ATOMIC_RELAXED);
  emulator::acquire(counter);
  return value;
}
inline void relax() { emulator::wait_a_little(); }

template <int BYTES> inline void copy_async(void* shared, const void* global, PK_HERE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % BYTES != 0)
    emulator::fail({file, line}, "an asynchronous copy of %d bytes is not aligned", BYTES);
  emulator::copy_later(shared, global, BYTES);
}
inline void copy_async_commit() { emulator::commit_copies(); }
template <int PENDING> inline void copy_async_wait() { emulator::wait_for_copies(PENDING); }

inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float sqrt_approx(float x) { return sqrtf(x); }
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits + 0x1000u) & 0xffffe000u;
}
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PK_HERE);
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PK_HERE);
void load_matrices(uint32_t (&d)[4], const void* shared_row, PK_HERE);

}  // namespace device

struct Limits {
  int compute_major, multiprocessors;
  int shared_block;
};
struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  uintptr_t stream = 0;
  unsigned cluster = 1;
  bool cooperative = false;
};
cudaError_t limits_of(int device, Limits& limits);
cudaError_t clear(void* pointer, size_t bytes, uintptr_t stream);
namespace emulator {
void run(const Launch& where, const std::function<void()>& kernel);
}  // namespace emulator
template <class... P, class... A> inline cudaError_t launch(void (*kernel)(P...), const Launch& where, A&&... arguments) {
  emulator::run(where, [&] { kernel(P(arguments)...); });
  return cudaSuccess;
}

}  // namespace pk

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "emulated error"; }
