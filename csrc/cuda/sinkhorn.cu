// Dense batched Sinkhorn in the log domain: one thread block a problem, one launch for the whole solve, convergence decided
// on the device. Balanced, KL-unbalanced and semi-unbalanced, with masks and warm starts. Compiled, not yet executed on a GPU.
//
// The cost is read twice an iteration from the cache or memory: rows by warps (lanes along the columns), columns by threads
// (neighbouring threads on neighbouring columns), so both reads are coalesced.
#include "../api.h"
#include "device.cuh"

namespace pk {
namespace {

constexpr int THREADS = 512;

template <class T>
__global__ void __launch_bounds__(THREADS) sinkhorn_kernel(SinkhornTask<T> task, T* __restrict__ workspace) {
  using namespace device;
  __shared__ T shared[THREADS / WARP];
  const int64_t p = blockIdx.x, N = task.rows, M = task.cols;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const T* __restrict__ cost = task.cost + p * N * M;
  const T *a = task.a + p * N, *b = task.b + p * M;
  const uint8_t* rows = task.row_mask ? task.row_mask + p * N : nullptr;
  const uint8_t* cols = task.col_mask ? task.col_mask + p * M : nullptr;
  T *f = task.f + p * N, *g = task.g + p * M;
  T *log_a = workspace + p * (N + M), *log_b = log_a + N;
  const T eps = T(task.epsilon[p]), inv_eps = T(1.0 / task.epsilon[p]);
  const T tau_a = T(task.tau_a), tau_b = T(task.tau_b);

  T sum_a = 0, sum_b = 0;
  bool sound = true;
  for (int64_t i = threadIdx.x; i < N; i += THREADS) {
    const bool real = !rows || rows[i];
    const T w = real ? a[i] : T(0);
    sum_a += w;
    log_a[i] = w > T(0) ? log(w) : T(-INFINITY);
    f[i] = real && task.f_init ? task.f_init[p * N + i] : T(0);
    sound = sound && isfinite(f[i]);
  }
  for (int64_t j = threadIdx.x; j < M; j += THREADS) {
    const bool real = !cols || cols[j];
    const T w = real ? b[j] : T(0);
    sum_b += w;
    log_b[j] = w > T(0) ? log(w) : T(-INFINITY);
    g[j] = real && task.g_init ? task.g_init[p * M + j] : T(0);
    sound = sound && isfinite(g[j]);
  }
  sum_a = block_reduce<T, false>(sum_a, shared);
  sum_b = block_reduce<T, false>(sum_b, shared);
  if (sum_a <= T(0) || sum_b <= T(0)) {  // nothing to transport
    for (int64_t i = threadIdx.x; i < N; i += THREADS) f[i] = 0;
    for (int64_t j = threadIdx.x; j < M; j += THREADS) g[j] = 0;
    if (threadIdx.x == 0) task.n_iters[p] = 0, task.residual[p] = 0;
    return;
  }
  sound = sound && isfinite(sum_a) && isfinite(sum_b);
  for (int64_t k = threadIdx.x; k < N * M; k += THREADS)
    if ((!rows || rows[k / M]) && (!cols || cols[k % M])) sound = sound && isfinite(cost[k]);
  const auto give_up = [&](int iterations) {  // an inf or a NaN: say so instead of returning numbers
    for (int64_t i = threadIdx.x; i < N; i += THREADS) f[i] = !rows || rows[i] ? T(NAN) : T(0);
    for (int64_t j = threadIdx.x; j < M; j += THREADS) g[j] = !cols || cols[j] ? T(NAN) : T(0);
    if (threadIdx.x == 0) task.n_iters[p] = iterations, task.residual[p] = T(NAN);
  };
  if (!__syncthreads_and(sound)) return give_up(0);

  T residual = T(INFINITY);
  int iteration = 0;
  bool rows_first = !(task.f_init && !task.g_init);  // a start from f alone begins with half an iteration
  while (iteration < task.max_iters) {
    T moved = 0;
    if (rows_first) {
      for (int64_t i = warp; i < N; i += THREADS / WARP) {
        if (rows && !rows[i]) continue;
        LogSum<T> sum;
        for (int64_t j = lane; j < M; j += WARP) sum.add((g[j] - cost[i * M + j]) * inv_eps + log_b[j]);
        sum.merge_warp();
        const T next = -eps * tau_a * sum.log_value();
        moved = max(moved, fabs(next - f[i]));
        __syncwarp();  // all lanes have read f[i]
        if (lane == 0) f[i] = next;
      }
      __syncthreads();
    }
    for (int64_t j = threadIdx.x; j < M; j += THREADS) {
      if (cols && !cols[j]) continue;
      LogSum<T> sum;
      for (int64_t i = 0; i < N; ++i) sum.add((f[i] - cost[i * M + j]) * inv_eps + log_a[i]);
      const T next = -eps * tau_b * sum.log_value();
      moved = max(moved, fabs(next - g[j]));
      g[j] = next;
    }
    moved = block_reduce<T, true>(moved, shared);  // its barriers also publish g
    if (!rows_first) {
      rows_first = true;
      continue;
    }
    ++iteration;
    residual = moved * inv_eps;
    if (residual < T(task.tol)) break;  // the same value in every thread
  }

  // The maximum above passes over NaN, so what overflowed on the way is found here.
  for (int64_t i = threadIdx.x; i < N; i += THREADS) sound = sound && isfinite(f[i]);
  for (int64_t j = threadIdx.x; j < M; j += THREADS) sound = sound && isfinite(g[j]);
  if (!__syncthreads_and(sound)) return give_up(iteration);

  if (task.tau_a == 1.0 && task.tau_b == 1.0) {  // choose sum a f = sum b g among the equivalent potentials
    T gap = 0;
    for (int64_t i = threadIdx.x; i < N; i += THREADS)
      if (!rows || rows[i]) gap += a[i] * f[i];
    for (int64_t j = threadIdx.x; j < M; j += THREADS)
      if (!cols || cols[j]) gap -= b[j] * g[j];
    const T shift = block_reduce<T, false>(gap, shared) / (sum_a + sum_b);
    for (int64_t i = threadIdx.x; i < N; i += THREADS)
      if (!rows || rows[i]) f[i] -= shift;
    for (int64_t j = threadIdx.x; j < M; j += THREADS)
      if (!cols || cols[j]) g[j] += shift;
  }
  if (threadIdx.x == 0) task.n_iters[p] = iteration, task.residual[p] = residual;
}

}  // namespace

CudaStatus cuda_devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);  // no driver or no device is an answer, not a failure
  if (error != cudaSuccess) return {0, cudaGetErrorString(error)};
  return {count, count == 0 ? "the driver reports none" : ""};
}

template <class T> size_t cuda_sinkhorn_workspace(const SinkhornTask<T>& task) {
  return size_t(task.problems) * size_t(task.rows + task.cols);
}

template <class T> const char* cuda_sinkhorn(const SinkhornTask<T>& task, T* workspace, int device, uintptr_t stream) {
  if (task.mass != nullptr) return "exact mass is not implemented";
  if (task.problems == 0) return nullptr;
  if (task.problems > 0x7fffffff) return "more than 2^31 - 1 problems in one call";
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  sinkhorn_kernel<T><<<unsigned(task.problems), THREADS, 0, reinterpret_cast<cudaStream_t>(stream)>>>(task, workspace);
  error = cudaGetLastError();
  const cudaError_t restored = cudaSetDevice(before);
  if (error == cudaSuccess) error = restored;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template size_t cuda_sinkhorn_workspace<float>(const SinkhornTask<float>&);
template size_t cuda_sinkhorn_workspace<double>(const SinkhornTask<double>&);
template const char* cuda_sinkhorn<float>(const SinkhornTask<float>&, float*, int, uintptr_t);
template const char* cuda_sinkhorn<double>(const SinkhornTask<double>&, double*, int, uintptr_t);

}  // namespace pk
