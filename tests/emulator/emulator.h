// CUDA for kernels that run on the CPU: what csrc/cuda/device.cuh offers and the builtins that it names. For tests only.
//
// Every CUDA thread is a fiber. They are switched at barriers and warp functions, in an order drawn from PK_SEED. Shared memory
// has its exact size and starts as NaN.  What a GPU would leave undefined
// ends the program with status 66: barriers that not all threads reach, lanes outside of a mask, blocks that wait for ever.
// PK_DEVICE names the device: sm_90, sm_80, or tiny and tiny_80 with little shared memory, which small problems do not fit.
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
template <class T> inline T __ldg(const T* pointer) { return *pointer; }
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
inline unsigned load_acquire(const unsigned* counter) {
  const unsigned value = __atomic_load_n(counter, __ATOMIC_RELAXED);
  emulator::acquire(counter);
  return value;
}
inline void relax() { emulator::wait_a_little(); }

inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }

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
