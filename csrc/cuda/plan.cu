// The plan of solved problems, its sums, and their gradient: one pass over the cost each, one exponential an entry.
//
// Sums take two launches: tiles leave their parts in the workspace, a second kernel adds them in a fixed order.
#include "density.cuh"
#include "host.h"

namespace pk {
namespace {

using namespace device;

constexpr int COLS = 128, ROWS = 32, WARPS = COLS / WARP;  // of a tile; a thread a column

Tiling tiling_of(const Solved<float>& problem) { return {problem.problems, problem.rows, problem.cols, ROWS, COLS}; }

template <bool LOG> __global__ void __launch_bounds__(COLS) plan_kernel(PlanTask<float> task, Storage storage, Tiling tiling) {
  const int64_t tile = blockIdx.x, first = tiling.row_tile(tile) * ROWS;
  const SolvedColumn column(task.problem, storage, tiling.problem(tile), tiling.col_tile(tile) * COLS + threadIdx.x);
  if (column.j >= task.problem.cols) return;
  for (int64_t i = first; i < first + ROWS && i < task.problem.rows; ++i) {
    float result = LOG ? -INFINITY : 0.0f;
    if (column.row_exists(i)) {
      const float a = column.row_weight(i);
      if (!LOG) result = a * column.entry(i).density * column.b;
      else if (a > 0 && column.b > 0) result = fmaf(log2_approx(a) + log2_approx(column.b), LN2, column.entry(i).x);
    }
    task.plan[column.at(i)] = result;
  }
}

// Parts of the sums: by rows [P, col_tiles, N], by columns [P, row_tiles, M], of everything [P, row_tiles, col_tiles].
struct Parts {
  float *rows, *cols, *totals;
  Tiling tiling;
  Parts(const Solved<float>& problem, void* workspace) : tiling(tiling_of(problem)) {
    rows = static_cast<float*>(workspace);
    cols = rows + problem.problems * tiling.col_tiles * problem.rows;
    totals = cols + problem.problems * tiling.row_tiles * problem.cols;
  }
  static size_t bytes(const Solved<float>& problem) {
    const Tiling tiling = tiling_of(problem);
    return sizeof(float) * size_t(problem.problems * (tiling.col_tiles * problem.rows + tiling.row_tiles * problem.cols +
                                                      tiling.row_tiles * tiling.col_tiles));
  }
};

struct Terms {  // what an entry adds to the sum of its row, of its column, and of everything
  float row, col, total;
};

struct PlanSums {
  PlanSumsTask<float> task;
  __device__ Terms see(const SolvedColumn& column, int64_t i, const Entry& entry) const {
    const float mass = column.row_weight(i) * entry.density * column.b;
    return {mass, mass, mass * entry.cost};
  }
  __device__ void skip(const SolvedColumn&, int64_t) const {}
  __device__ void row(int64_t at, float, float, float sum) const { task.rows[at] = sum; }
  __device__ void col(int64_t at, float, float, float sum) const { task.cols[at] = sum; }
  __device__ void total(int64_t p, float, float sum) const { task.energy[p] = sum; }
};

// With G the gradient with respect to an entry of the plan (its own, those of its two sums, energy_bar C) and
// h = density G:  a_bar = sum_j h b, b_bar = sum_i h a, f_bar = a a_bar / epsilon, cost_bar = energy_bar plan - h a b / epsilon.
struct PlanBackward {
  PlanBackwardTask<float> task;
  __device__ Terms see(const SolvedColumn& column, int64_t i, const Entry& entry) const {
    const int64_t p = column.p, at = column.at(i);
    const float a = column.row_weight(i), energy = task.grad_energy ? __ldg(task.grad_energy + p) : 0.0f;
    if (!column.exists) {
      if (column.j < task.problem.cols) task.cost[at] = 0;
      return {0.0f, 0.0f, 0.0f};
    }
    float grad = task.grad_plan ? __ldg(task.grad_plan + at) : 0.0f;
    grad += (task.grad_rows ? __ldg(task.grad_rows + p * task.problem.rows + i) : 0.0f) +
            (task.grad_cols ? __ldg(task.grad_cols + p * task.problem.cols + column.j) : 0.0f);
    grad = fmaf(energy, entry.cost, grad);
    const float h = entry.density * grad, hb = h * column.b;
    task.cost[at] = a * (energy * entry.density * column.b - column.inverse_epsilon * hb);
    return {hb, a * h, a * hb * entry.x};
  }
  __device__ void skip(const SolvedColumn& column, int64_t i) const {
    if (i < task.problem.rows && column.j < task.problem.cols) task.cost[column.at(i)] = 0;
  }
  __device__ void row(int64_t at, float weight, float inverse_epsilon, float sum) const {
    task.a[at] = sum, task.f[at] = weight * sum * inverse_epsilon;
  }
  __device__ void col(int64_t at, float weight, float inverse_epsilon, float sum) const {
    task.b[at] = sum, task.g[at] = weight * sum * inverse_epsilon;
  }
  __device__ void total(int64_t p, float inverse_epsilon, float sum) const { task.epsilon[p] = -double(sum) * inverse_epsilon; }
};

template <class Work> __global__ void __launch_bounds__(COLS) tile_kernel(Work work, Storage storage, Parts parts) {
  PK_SHARED(float, by_warp, WARPS * ROWS);
  PK_SHARED(float, scratch, WARPS);
  const Tiling& tiling = parts.tiling;
  const Solved<float>& problem = work.task.problem;
  const int64_t tile = blockIdx.x, p = tiling.problem(tile), first = tiling.row_tile(tile) * ROWS;
  const SolvedColumn column(problem, storage, p, tiling.col_tile(tile) * COLS + threadIdx.x);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float col = 0, total = 0;
  for (int group = 0; group < ROWS; group += 8) {
    float rows[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const int64_t i = first + group + r;
      rows[r] = 0;
      if (!column.row_exists(i)) {
        work.skip(column, i);
        continue;
      }
      const Terms terms = work.see(column, i, column.entry(i));
      rows[r] = terms.row, col += terms.col, total += terms.total;
    }
    __syncwarp();
    const float sum = transpose_sum(rows);
    if (lane % 4 == 0) by_warp[warp * ROWS + group + lane / 4] = sum;
  }
  __syncthreads();
  const int64_t i = first + threadIdx.x;
  if (threadIdx.x < ROWS && i < problem.rows) {
    float sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += by_warp[w * ROWS + threadIdx.x];
    parts.rows[(p * tiling.col_tiles + tiling.col_tile(tile)) * problem.rows + i] = sum;
  }
  if (column.j < problem.cols) parts.cols[(p * tiling.row_tiles + tiling.row_tile(tile)) * problem.cols + column.j] = col;
  total = block_reduce<float, false>(total, scratch);
  if (threadIdx.x == 0) parts.totals[tile] = total;
}

// A thread a row or column; the last block of a problem adds up its total.
template <class Work> __global__ void __launch_bounds__(COLS) add_kernel(Work work, Parts parts, int64_t blocks) {
  PK_SHARED(float, scratch, WARPS);
  const Solved<float>& problem = work.task.problem;
  const Tiling& tiling = parts.tiling;
  const int64_t N = problem.rows, M = problem.cols, p = blockIdx.x / (blocks + 1), block = blockIdx.x % (blocks + 1);
  const float inverse_epsilon = float(1.0 / problem.epsilon[p]);
  if (block == blocks) {
    const int64_t tiles = tiling.row_tiles * tiling.col_tiles;
    float sum = 0;
    for (int64_t tile = threadIdx.x; tile < tiles; tile += COLS) sum += parts.totals[p * tiles + tile];
    sum = block_reduce<float, false>(sum, scratch);
    if (threadIdx.x == 0) work.total(p, inverse_epsilon, sum);
    return;
  }
  const int64_t index = block * COLS + threadIdx.x;
  const bool of_rows = index < N;
  const int64_t k = of_rows ? index : index - N, size = of_rows ? N : M;
  if (k >= size) return;
  const int64_t tiles = of_rows ? tiling.col_tiles : tiling.row_tiles;
  const float* part = (of_rows ? parts.rows : parts.cols) + p * tiles * size + k;
  float sum = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) sum += part[tile * size];
  const uint8_t* const mask = of_rows ? problem.row_mask : problem.col_mask;
  const bool exists = mask == nullptr || mask[p * size + k];
  const float weight = exists ? __ldg((of_rows ? problem.a : problem.b) + p * size + k) : 0.0f;
  if (of_rows) work.row(p * N + k, weight, inverse_epsilon, sum);
  else work.col(p * M + k, weight, inverse_epsilon, sum);
}

const char* refusal(const Solved<float>& problem) {
  const int64_t blocks = (problem.rows + problem.cols + COLS - 1) / COLS + 1;
  if (tiling_of(problem).count() > 0x7fffffff || problem.problems * blocks > 0x7fffffff)
    return "more than 2^43 entries; use smaller batches";
  return nullptr;
}
bool is_empty(const Solved<float>& problem) { return problem.problems * problem.rows * problem.cols == 0; }

template <class Work> const char* run(const Work& work, const CudaCall& call) {
  const Solved<float>& problem = work.task.problem;
  if (is_empty(problem)) return nullptr;
  if (const char* reason = refusal(problem)) return reason;
  return on_device(call.device, [&] {
    const Parts parts(problem, call.workspace);
    const Launch tiles{dim3(unsigned(parts.tiling.count())), dim3(COLS), 0, call.stream};
    const cudaError_t error = launch(tile_kernel<Work>, tiles, work, call.storage, parts);
    if (error != cudaSuccess) return error;
    const int64_t blocks = (problem.rows + problem.cols + COLS - 1) / COLS;
    const Launch sums{dim3(unsigned(problem.problems * (blocks + 1))), dim3(COLS), 0, call.stream};
    return launch(add_kernel<Work>, sums, work, parts, blocks);
  });
}

}  // namespace

const char* cuda_plan(const PlanTask<float>& task, const CudaCall& call) {
  if (is_empty(task.problem)) return nullptr;
  if (const char* reason = refusal(task.problem)) return reason;
  return on_device(call.device, [&] {
    const Tiling tiling = tiling_of(task.problem);
    const Launch where{dim3(unsigned(tiling.count())), dim3(COLS), 0, call.stream};
    return launch(task.logarithm ? plan_kernel<true> : plan_kernel<false>, where, task, call.storage, tiling);
  });
}

size_t cuda_plan_sums_workspace(const PlanSumsTask<float>& task, const CudaCall&) { return Parts::bytes(task.problem); }
const char* cuda_plan_sums(const PlanSumsTask<float>& task, const CudaCall& call) { return run(PlanSums{task}, call); }

size_t cuda_plan_backward_workspace(const PlanBackwardTask<float>& task, const CudaCall&) { return Parts::bytes(task.problem); }
const char* cuda_plan_backward(const PlanBackwardTask<float>& task, const CudaCall& call) { return run(PlanBackward{task}, call); }

}  // namespace pk
