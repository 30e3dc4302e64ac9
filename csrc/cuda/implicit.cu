// Gradient of the potentials at the fixed point: a block a problem, one dense system of the shorter side.
//
// With x_ij the exponents of the plan P_ij = a_i b_j exp(x_ij), p and q its sums, and everything scaled by their roots,
//
//   z + Y w = grad_f sqrt(tau_a / p),   w + Y^T z = grad_g sqrt(tau_b / q),   Y_ij = sqrt(tau_a tau_b) P_ij / sqrt(p_i q_j) <= 1,
//
// w is eliminated: (I - Y Y^T) z = right. Rows of I - Y Y^T times sqrt(p) are (1 - tau_a tau_b) sqrt(p): the diagonal follows from
// the other entries without cancellation, however close to singular the system is. Sums are kept as logarithms: none overflows.
#include "density.cuh"
#include "host.h"
#include "log_domain.cuh"

namespace pk {
namespace {

using namespace device;

constexpr int THREADS = 256, TALL = 4;  // Y Y^T in tiles of 4 x 4

struct Sizes {
  int64_t shorter, longer;
  bool turned;        // the columns are the shorter side
  bool matrix_shared;  // the system lies in shared memory
  size_t problem_bytes;
  __host__ __device__ int64_t padded() const { return (shorter + TALL - 1) / TALL * TALL; }
};

// One side of a problem: its arrays, and in double log2 sum_j exp(x_ij) b_j; the root of the plan's sum; the gradient that is
// left to solve for; z or w, which become v or u.
struct Margin {
  const float *potential, *weight, *grad;
  const uint8_t* mask;
  float* to_weight;
  int64_t size, stride;
  double tau;
  double *log_sum = nullptr, *root = nullptr, *right = nullptr, *result = nullptr;

  __device__ bool exists(int64_t i) const { return mask == nullptr || mask[i]; }
  __device__ float weight_of(int64_t i) const { return exists(i) ? weight[i] : 0.0f; }
  __device__ double scaled(int64_t i) const { return root[i] > 0 ? right[i] * sqrt(tau) / root[i] : 0.0; }
  __host__ __device__ void carve(Carver& memory, int64_t count) {
    for (double** vector : {&log_sum, &root, &right, &result}) *vector = reinterpret_cast<double*>(memory.floats(2 * count));
  }
};

// One problem, turned so that `shorter` has at most as many entries as `longer`.
struct Oriented {
  const float* cost;
  float* to_cost;
  Margin shorter, longer;
  float* Y;        // [padded shorter, longer]
  double* system;  // [shorter, shorter]
  double epsilon;
  float inverse_epsilon;

  __device__ Oriented(const ImplicitTask<float>& task, const Sizes& sizes, int64_t p) {
    const Solved<float>& problem = task.problem;
    const int64_t N = problem.rows, M = problem.cols;
    cost = problem.cost + p * N * M, to_cost = task.cost + p * N * M, epsilon = problem.epsilon[p];
    inverse_epsilon = float(1.0 / epsilon);
    Margin rows{problem.f + p * N, problem.a + p * N, task.grad_f + p * N, problem.row_mask ? problem.row_mask + p * N : nullptr,
                task.a + p * N, N, M, task.tau_a};
    Margin cols{problem.g + p * M, problem.b + p * M, task.grad_g + p * M, problem.col_mask ? problem.col_mask + p * M : nullptr,
                task.b + p * M, M, 1, task.tau_b};
    if (sizes.turned) shorter = cols, longer = rows;
    else shorter = rows, longer = cols;
  }
  Oriented() = default;
  // Set up the memory; returns its bytes.
  __host__ __device__ size_t carve(unsigned char* base, unsigned char* shared, const Sizes& sizes) {
    Carver memory{base};
    Y = memory.floats(sizes.padded() * sizes.longer);
    shorter.carve(memory, sizes.shorter), longer.carve(memory, sizes.longer);
    const int64_t entries = sizes.shorter * sizes.shorter;
    system = reinterpret_cast<double*>(sizes.matrix_shared ? shared : reinterpret_cast<unsigned char*>(memory.floats(2 * entries)));
    return size_t(round_to(int64_t(memory.used), 256));
  }
  __device__ int64_t at(int64_t i, int64_t j) const { return i * shorter.stride + j * longer.stride; }
  // Natural exponent of entry i of the shorter and j of the longer side, which exist.
  __device__ float exponent(int64_t i, int64_t j) const {
    const float x = ((shorter.potential[i] + longer.potential[j]) - __ldg(cost + at(i, j))) * inverse_epsilon;
    return shorter.weight[i] > 0 && longer.weight[j] > 0 ? x : min(x, DENSITY_CEILING);
  }
};

struct Implicit {
  Oriented problem;
  bool balanced;
  double* scratch;  // one a warp
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = THREADS / WARP;

  __device__ double total_of(double x) const {
    const double total = block_reduce<double, false>(x, scratch);
    __syncthreads();
    return total;
  }

  // ---- the sums of the plan --------------------------------------------------------------------------------------------

  __device__ static void find_sums(const Margin& side, int64_t i, const LogSum& logs) {
    side.log_sum[i] = double(logs.value());
    const double weight = side.weight_of(i);
    side.root[i] = weight > 0 ? sqrt(weight * exp2(side.log_sum[i])) : 0.0;
    side.right[i] = side.exists(i) ? side.grad[i] : 0.0;
  }
  __device__ float weighed(int64_t i, int64_t j, float weight) const {
    return fmaf(problem.exponent(i, j), LOG2_E, log2_approx(weight));
  }
  __device__ void find_all_sums() {
    for (int64_t i = warp; i < problem.shorter.size; i += warps) {
      LogSum logs;
      const bool there = problem.shorter.exists(i);
      for (int64_t j = lane; j < problem.longer.size && there; j += WARP) {
        const float b = problem.longer.weight_of(j);
        if (b > 0) logs.add(weighed(i, j, b));
      }
      __syncwarp();
      logs.across_warp();
      if (lane == 0) find_sums(problem.shorter, i, logs);
    }
    for (int64_t j = threadIdx.x; j < problem.longer.size; j += THREADS) {
      LogSum logs;
      for (int64_t i = 0; i < problem.shorter.size && problem.longer.exists(j); ++i) {
        const float a = problem.shorter.weight_of(i);
        if (a > 0) logs.add(weighed(i, j, a));
      }
      find_sums(problem.longer, j, logs);
    }
    __syncthreads();
  }

  // ---- the system ------------------------------------------------------------------------------------------------------

  // What is known of entries without weight goes to the other side's gradient. Then Y, 0 where a weight is.
  __device__ void build() {
    const Margin &shorter = problem.shorter, &longer = problem.longer;
    const int64_t n = problem.shorter.size, m = problem.longer.size;
    for (int64_t i = warp; i < n; i += warps) {
      const float a = problem.shorter.weight_of(i);
      const float taus = float(shorter.tau * longer.tau);
      const float log_scale = a > 0 ? 0.5f * (log2_approx(a * taus) - float(shorter.log_sum[i])) : 0.0f;
      double known = 0;
      for (int64_t j = lane; j < m; j += WARP) {
        const float b = problem.longer.weight_of(j);
        float y = 0;
        if (a > 0 && b > 0) y = exp2_approx(weighed(i, j, 1) + log_scale + 0.5f * (log2_approx(b) - float(longer.log_sum[j])));
        else if (a > 0 && problem.longer.exists(j))
          known += double(a) * exp2_approx(weighed(i, j, 1) - float(longer.log_sum[j])) * problem.longer.grad[j];
        problem.Y[i * m + j] = y;
      }
      known = warp_sum(known);
      if (lane == 0 && a > 0) shorter.right[i] -= problem.longer.tau * known;
    }
    for (int64_t j = threadIdx.x; j < m; j += THREADS) {
      const float b = problem.longer.weight_of(j);
      for (int64_t i = n; i < (n + TALL - 1) / TALL * TALL; ++i) problem.Y[i * m + j] = 0;
      double known = 0;
      for (int64_t i = 0; i < n && b > 0; ++i)
        if (problem.shorter.exists(i) && !(problem.shorter.weight[i] > 0))
          known += double(b) * exp2_approx(weighed(i, j, 1) - float(shorter.log_sum[i])) * problem.shorter.grad[i];
      if (b > 0) longer.right[j] -= problem.shorter.tau * known;
    }
    __syncthreads();
  }
  // Y Y^T, the part on and below the diagonal.
  __device__ void multiply() {
    const int64_t n = problem.shorter.size, m = problem.longer.size, tiles = (n + TALL - 1) / TALL;
    for (int64_t t = warp; t < tiles * tiles; t += warps) {
      const int64_t i = t / tiles * TALL, k = t % tiles * TALL;
      if (k > i) continue;
      const float *left = problem.Y + i * m, *right = problem.Y + k * m;
      float sums[TALL][TALL] = {};
      for (int64_t j = lane; j < m; j += WARP) {
        float x[TALL], y[TALL];
#pragma unroll
        for (int r = 0; r < TALL; ++r) x[r] = left[r * m + j], y[r] = right[r * m + j];
#pragma unroll
        for (int r = 0; r < TALL; ++r)
#pragma unroll
          for (int c = 0; c < TALL; ++c) sums[r][c] = fmaf(x[r], y[c], sums[r][c]);
      }
#pragma unroll
      for (int r = 0; r < TALL; ++r)
#pragma unroll
        for (int c = 0; c < TALL; ++c) {
          const double total = warp_sum(double(sums[r][c]));
          if (lane == 0 && i + r < n && k + c <= i + r) problem.system[(i + r) * n + k + c] = total;
        }
    }
    __syncthreads();
  }
  // I - Y Y^T. balanced: its null vector sqrt(p) is lifted, which moves the solution only along a direction in which the gradient
  // does not change.
  __device__ void complete(double total) {
    const int64_t n = problem.shorter.size;
    const double* const root = problem.shorter.root;
    double* const A = problem.system;
    const double lost = 1 - problem.shorter.tau * problem.longer.tau;
    for (int64_t i = threadIdx.x; i < n; i += THREADS) {  // the diagonal first: it needs the other entries as they are
      double rest = 0;
      for (int64_t k = 0; k < n; ++k)
        if (k != i) rest += (k < i ? A[i * n + k] : A[k * n + i]) * root[k];
      problem.shorter.result[i] = root[i] > 0 ? lost + rest / root[i] + (balanced ? root[i] * root[i] / total : 0.0) : 1.0;
    }
    __syncthreads();
    for (int64_t at = threadIdx.x; at < n * n; at += THREADS) {
      const int64_t i = at / n, k = at % n;
      if (k < i) A[at] = (balanced ? root[i] * root[k] / total : 0.0) - A[at];
      else if (k == i) A[at] = problem.shorter.result[i];
    }
    __syncthreads();
  }
  // Lower triangle -> its Cholesky factor, with the inverse of the diagonal on the diagonal. A pivot that is nothing but
  // rounding becomes 0, and the solution is 0 in its place.
  __device__ void factorise() {
    const int64_t n = problem.shorter.size;
    double *const A = problem.system, *const before = problem.shorter.result;  // the diagonal as it was
    for (int64_t k = 0; k < n; ++k) {
      const double pivot = A[k * n + k], inverse = pivot > 1e-15 * before[k] ? 1 / sqrt(pivot) : 0.0;
      __syncthreads();
      if (threadIdx.x == 0) A[k * n + k] = inverse;
      for (int64_t i = k + 1 + threadIdx.x; i < n; i += THREADS) A[i * n + k] *= inverse;
      __syncthreads();
      const int64_t left = n - k - 1;
      for (int64_t at = threadIdx.x; at < left * left; at += THREADS) {
        const int64_t i = k + 1 + at / left, j = k + 1 + at % left;
        if (j <= i) A[i * n + j] -= A[i * n + k] * A[j * n + k];
      }
      __syncthreads();
    }
  }
  __device__ void substitute(double* z) {
    const int64_t n = problem.shorter.size;
    const double* const A = problem.system;
    for (int64_t k = 0; k < n; ++k) {
      const double solved = z[k] * A[k * n + k];
      __syncthreads();
      for (int64_t i = k + threadIdx.x; i < n; i += THREADS) z[i] = i == k ? solved : z[i] - A[i * n + k] * solved;
      __syncthreads();
    }
    for (int64_t k = n - 1; k >= 0; --k) {
      const double solved = z[k] * A[k * n + k];
      __syncthreads();
      for (int64_t i = threadIdx.x; i <= k; i += THREADS) z[i] = i == k ? solved : z[i] - A[k * n + i] * solved;
      __syncthreads();
    }
  }

  // ---- solve and write -------------------------------------------------------------------------------------------------

  // v = tau x and u = tau y in the results of the sides.
  __device__ void solve() {
    const Margin &shorter = problem.shorter, &longer = problem.longer;
    const int64_t n = problem.shorter.size, m = problem.longer.size;
    double part = 0;
    for (int64_t i = threadIdx.x; i < n; i += THREADS) part += shorter.root[i] * shorter.root[i];
    const double total = total_of(part);
    multiply();
    complete(total);
    factorise();
    for (int64_t i = warp; i < n; i += warps) {
      double product = 0;
      for (int64_t j = lane; j < m; j += WARP) product += double(problem.Y[i * m + j]) * longer.scaled(j);
      product = warp_sum(product);
      if (lane == 0) shorter.result[i] = shorter.root[i] > 0 ? shorter.scaled(i) - product : 0.0;
    }
    __syncthreads();
    substitute(shorter.result);
    if (balanced) {  // rounding may have grown along the null vector
      part = 0;
      for (int64_t i = threadIdx.x; i < n; i += THREADS) part += shorter.result[i] * shorter.root[i];
      const double along = total_of(part) / total;
      for (int64_t i = threadIdx.x; i < n; i += THREADS) shorter.result[i] -= along * shorter.root[i];
      __syncthreads();
    }
    for (int64_t j = threadIdx.x; j < m; j += THREADS) {
      double product = 0;
      for (int64_t i = 0; i < n; ++i) product += double(problem.Y[i * m + j]) * shorter.result[i];
      longer.result[j] = longer.scaled(j) - product;
    }
    __syncthreads();
    const auto unscale = [](const Margin& side) {
      for (int64_t i = threadIdx.x; i < side.size; i += THREADS)
        side.result[i] = side.root[i] > 0 ? side.result[i] * side.root[i] * sqrt(side.tau) : side.tau * side.right[i];
    };
    unscale(shorter), unscale(longer);
    __syncthreads();
    if (balanced) share_constant(total);
  }
  // Of all solutions the one with sum v = sum u: it treats rows and columns alike, whichever are more.
  __device__ void share_constant(double total) {
    double excess = 0, other = 0;
    for (int64_t i = threadIdx.x; i < problem.shorter.size; i += THREADS) excess += problem.shorter.result[i];
    for (int64_t j = threadIdx.x; j < problem.longer.size; j += THREADS) {
      const double root = problem.longer.root[j];
      excess -= problem.longer.result[j], other += root * root;
    }
    const double share = total_of(excess) / (total + total_of(other));
    const auto shift = [](const Margin& side, double by) {
      for (int64_t i = threadIdx.x; i < side.size; i += THREADS) side.result[i] += by * side.root[i] * side.root[i];
    };
    shift(problem.shorter, -share), shift(problem.longer, share);
    __syncthreads();
  }
  // With R = exp(x - log s) and Q = exp(x - log t):
  //   grad_cost = R b v + Q a u,   a_bar = -epsilon sum_j Q u,   b_bar = -epsilon sum_i R v.
  // drift: what the choice sum a f = sum b g hands back. Returns the gradient of epsilon.
  __device__ double write(double drift) {
    const Margin &shorter = problem.shorter, &longer = problem.longer;
    const int64_t n = problem.shorter.size, m = problem.longer.size;
    double by_epsilon = 0;
    for (int64_t i = warp; i < n; i += warps) {
      const bool there = problem.shorter.exists(i);
      const float a = problem.shorter.weight_of(i), log_s = float(shorter.log_sum[i]), v = float(shorter.result[i]);
      double sum = 0, products = 0;
      for (int64_t j = lane; j < m; j += WARP) {
        if (!there || !problem.longer.exists(j)) {
          problem.to_cost[problem.at(i, j)] = 0;
          continue;
        }
        const float x = problem.exponent(i, j), scaled = x * LOG2_E;
        const float by_col = exp2_approx(scaled - float(longer.log_sum[j])) * float(longer.result[j]);
        const float grad = fmaf(exp2_approx(scaled - log_s) * v, problem.longer.weight[j], by_col * a);
        problem.to_cost[problem.at(i, j)] = grad;
        sum += double(by_col), products += double(grad * x);
      }
      sum = warp_sum(sum), products = warp_sum(products);
      if (lane == 0) {
        problem.shorter.to_weight[i] = there ? float(-problem.epsilon * sum - drift * problem.shorter.potential[i]) : 0.0f;
        if (there) by_epsilon += products - shorter.result[i] * shorter.log_sum[i] * LN2;
      }
    }
    for (int64_t j = threadIdx.x; j < m; j += THREADS) {
      const bool there = problem.longer.exists(j);
      double sum = 0;
      for (int64_t i = 0; i < n && there; ++i)
        if (problem.shorter.exists(i))
          sum += double(exp2_approx(problem.exponent(i, j) * LOG2_E - float(shorter.log_sum[i]))) * shorter.result[i];
      problem.longer.to_weight[j] = there ? float(-problem.epsilon * sum + drift * problem.longer.potential[j]) : 0.0f;
      if (there) by_epsilon -= longer.result[j] * longer.log_sum[j] * LN2;
    }
    return total_of(by_epsilon);
  }

  __device__ double run() {
    const Margin &shorter = problem.shorter, &longer = problem.longer;
    const auto weight_of = [this](const Margin& side) {
      double part = 0;
      for (int64_t i = threadIdx.x; i < side.size; i += THREADS) part += side.weight_of(i);
      return total_of(part);
    };
    const double weight = weight_of(shorter), other_weight = weight_of(longer);
    if (weight == 0 || other_weight == 0) {
      for (int64_t at = threadIdx.x; at < shorter.size * longer.size; at += THREADS) problem.to_cost[at] = 0;
      for (int64_t i = threadIdx.x; i < shorter.size; i += THREADS) shorter.to_weight[i] = 0;
      for (int64_t j = threadIdx.x; j < longer.size; j += THREADS) longer.to_weight[j] = 0;
      return 0;
    }
    double drift = 0;
    find_all_sums();
    if (balanced) {  // undo the choice sum a f = sum b g
      double part = 0;
      for (int64_t i = threadIdx.x; i < problem.shorter.size; i += THREADS) part += problem.shorter.right[i];
      for (int64_t j = threadIdx.x; j < problem.longer.size; j += THREADS) part -= problem.longer.right[j];
      drift = total_of(part) / (weight + other_weight);
      const auto shift = [](const Margin& side, double by) {
        for (int64_t i = threadIdx.x; i < side.size; i += THREADS) side.right[i] += by * double(side.weight_of(i));
      };
      shift(shorter, -drift), shift(longer, drift);
      __syncthreads();
    }
    build();
    solve();
    return write(drift);
  }
};

__global__ void __launch_bounds__(THREADS) implicit_kernel(ImplicitTask<float> task, Sizes sizes, unsigned char* workspace) {
  PK_DYNAMIC_SHARED(shared);
  PK_SHARED(double, scratch, THREADS / WARP);
  const int64_t p = blockIdx.x;
  Implicit work{Oriented(task, sizes, p), task.tau_a == 1.0 && task.tau_b == 1.0, scratch};
  work.problem.carve(workspace + size_t(p) * sizes.problem_bytes, shared, sizes);
  const double by_epsilon = work.run();
  if (threadIdx.x == 0) task.epsilon[p] = by_epsilon, task.mass[p] = 0, task.sound[p] = 1;
}

cudaError_t sizes_of(const ImplicitTask<float>& task, const CudaCall& call, Sizes& sizes) {
  Limits limits;
  const cudaError_t error = limits_of(call.device, limits);
  if (error != cudaSuccess) return error;
  const int64_t N = task.problem.rows, M = task.problem.cols;
  sizes = {N < M ? N : M, N < M ? M : N, N > M, false, 0};
  sizes.matrix_shared = size_t(sizes.shorter * sizes.shorter) * sizeof(double) + 1024 <= size_t(limits.shared_block);
  alignas(16) static unsigned char nowhere[16];  // only counted
  sizes.problem_bytes = Oriented().carve(nowhere, nowhere, sizes);
  return cudaSuccess;
}
bool is_empty(const Solved<float>& problem) { return problem.problems * problem.rows * problem.cols == 0; }

}  // namespace

size_t cuda_implicit_workspace(const ImplicitTask<float>& task, const CudaCall& call) {
  Sizes sizes;
  if (is_empty(task.problem) || sizes_of(task, call, sizes) != cudaSuccess) return 0;
  return size_t(task.problem.problems) * sizes.problem_bytes;
}

const char* cuda_implicit(const ImplicitTask<float>& task, const CudaCall& call) {
  if (is_empty(task.problem)) return nullptr;
  if (task.exact_mass) return "an exact mass is not there on CUDA; use backend='reference'";
  if (task.problem.problems > 0x7fffffff) return "more than 2^31 problems; use smaller batches";
  return on_device(call.device, [&] {
    Sizes sizes;
    const cudaError_t error = sizes_of(task, call, sizes);
    if (error != cudaSuccess) return error;
    const size_t shared = sizes.matrix_shared ? size_t(sizes.shorter * sizes.shorter) * sizeof(double) : 0;
    const Launch where{dim3(unsigned(task.problem.problems)), dim3(THREADS), shared, call.stream};
    return launch(implicit_kernel, where, task, sizes, static_cast<unsigned char*>(call.workspace));
  });
}

}  // namespace pk
