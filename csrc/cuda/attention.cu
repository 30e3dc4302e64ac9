// Transport attention: cost, solve and fusion of every head of a layer in one launch; and the gradient of the fusion.
//
//   refined_ij = (A_ij + c)(P_ij + c) / sum_j (A_ij + c)(P_ij + c),   P: rows of the plan, each with the sum 1.
//
// The cost is never stored: its semantic term comes from `similarity`, the rest is computed entry by entry.
#include "placement.h"
#include "solver.cuh"
#include "token_cost.cuh"

namespace pk {
namespace {

using namespace device;

constexpr float FLOOR = 1e-6f;  // c

// Rows beyond 40, and the few that two passes handle as fast, take the kernel for any number: fewer threads than the dense
// solve, so that the cost of an entry fits their registers, too.
constexpr int ATTENTION_THREADS = 384;
Needs needs_of(int64_t rows) { return {rows > 32 && rows <= 40 ? 40 : 0, ATTENTION_THREADS, TokenCost::shared_bytes(rows)}; }

struct Head {
  const void* attention;  // [N, M]
  void* refined;          // the same
  float* plan;            // [N, M] or null
  Storage storage;
  __device__ Head(const AttentionTask<float>& task, Storage storage_, int64_t h) : storage(storage_) {
    const int64_t entry = h * task.cost.rows * task.cost.cols, bytes = entry * (storage == Storage::float32 ? 4 : 2);
    attention = reinterpret_cast<const char*>(task.cost.attention) + bytes;
    refined = reinterpret_cast<char*>(task.refined) + bytes, plan = task.plan ? task.plan + entry : nullptr;
  }
};

// Rows that are not selected are what they were, and nothing is transported from them.
__device__ void keep_rows(const Head& head, const uint8_t* mask, int64_t rows, int m, int first, int cols) {
  const int warps = blockDim.x / WARP;
  for (int i = threadIdx.x / WARP; i < rows; i += warps) {
    if (mask == nullptr || mask[i]) continue;
    for (int j = threadIdx.x % WARP; j < cols; j += WARP) {
      const int at = i * m + first + j;
      store_rounded(head.refined, head.storage, at, load_stored(head.attention, head.storage, at));
      if (head.plan) head.plan[at] = 0;
    }
  }
}

// A head that has no solution says so.
__device__ void fill_nan(const Head& head, const Problem& problem, const TokenCost& cost) {
  const int warps = blockDim.x / WARP;
  for (int i = threadIdx.x / WARP; i < cost.n; i += warps)
    for (int j = threadIdx.x % WARP; j < problem.m; j += WARP) {
      const int at = cost.rows[i] * cost.m + problem.first + j;
      store_rounded(head.refined, head.storage, at, NAN);
      if (head.plan) head.plan[at] = NAN;
    }
}

// With e_ij = exp2(k (f_i / tau + g_j - C_ij)) b_j, whose row sums are near 1 at a fixed point, P = e / sum e. One exponential an
// entry: e takes the place of K. The undamped f_i / tau is found again if the iterations have stopped far from the fixed point, and
// with an exact mass.
template <class Solver> __device__ void fuse(Solver& solver, const Head& head, float residual) {
  Problem& problem = solver.problem;
  Peers& peers = solver.peers;
  const TokenCost& cost = solver.cost;
  const float k = problem.scale;
  for (int i = threadIdx.x; i < problem.n; i += blockDim.x) problem.rows.damping(i) = problem.row_potential(i);
  __syncthreads();
  if (!(residual < 1) || problem.mass > 0) {  // caps are no log-sums of their rows either
    problem.mass = 0;
    begin_logs(problem);
    log_rows(problem, cost, peers);
  }
  const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP, quads = problem.row_stride / QUAD;
  const float undamp = 1.0f / problem.rows.tau;
  float2* const sums = reinterpret_cast<float2*>(peers.slot());
  const auto entry_of = [&](int i) { return cost.rows[i] * cost.m + problem.first; };
  for (int q = threadIdx.x / WARP; q * QUAD < problem.n; q += warps) {
    float base[QUAD], e_sum[QUAD] = {}, product[QUAD] = {};
    int row[QUAD];
#pragma unroll
    for (int r = 0; r < QUAD; ++r) {
      const int i = min(q * QUAD + r, problem.n - 1);  // beyond the last row: the same once more, not used
      base[r] = problem.row_potential(i) * undamp, row[r] = entry_of(i);
    }
    for (int j = lane; j < problem.m; j += WARP) {
      const auto column = cost.column(problem.first + j);
      const float g = problem.col_potential(j), b = problem.cols.weight(j);
      float e[QUAD];
#pragma unroll
      for (int r = 0; r < QUAD; ++r) {
        const int i = min(q * QUAD + r, problem.n - 1);
        e[r] = exp2_approx(((base[r] + g) - column.at(i)) * k) * b;
        e_sum[r] += e[r], product[r] = fmaf(load_stored(head.attention, head.storage, row[r] + j), e[r], product[r]);
      }
      problem.K[Problem::quad(quads, q, j)] = make_float4(e[0], e[1], e[2], e[3]);
    }
#pragma unroll
    for (int r = 0; r < QUAD; ++r) {
      const float total = warp_sum(e_sum[r]), with_attention = warp_sum(product[r]);
      if (lane == 0 && q * QUAD + r < problem.n) sums[q * QUAD + r] = make_float2(total, with_attention);
    }
  }
  peers.sync();
  for (int q = threadIdx.x / WARP; q * QUAD < problem.n; q += warps) {
    float share[QUAD], norm[QUAD], mass[QUAD];
#pragma unroll
    for (int r = 0; r < QUAD; ++r) {
      const int i = min(q * QUAD + r, problem.n - 1);
      float total = 0, product = 0;
      for (unsigned other = 0; other < peers.count; ++other) {
        const float2 part = reinterpret_cast<const float2*>(peers.slot_of(other))[i];
        total += part.x, product += part.y;
      }
      share[r] = 1.0f / total;
      norm[r] = 1.0f / (product * share[r] + FLOOR * (cost.means[i].w + 1.0f) + float(cost.m) * FLOOR * FLOOR);
      mass[r] = problem.rows.weight(i) * exp2_approx((problem.rows.damping(i) - problem.row_potential(i) * undamp) * k);
    }
    for (int j = lane; j < problem.m; j += WARP) {
      const float4 quad = problem.K[Problem::quad(quads, q, j)];
      const float e[QUAD] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
      for (int r = 0; r < QUAD; ++r) {
        if (q * QUAD + r >= problem.n) break;
        const int at = entry_of(q * QUAD + r) + j;
        const float attention = load_stored(head.attention, head.storage, at);
        store_rounded(head.refined, head.storage, at, (attention + FLOOR) * fmaf(e[r], share[r], FLOOR) * norm[r]);
        if (head.plan) head.plan[at] = e[r] * mass[r];
      }
    }
  }
  peers.flip();
}

template <int ROWS>
__global__ void __launch_bounds__(ROWS > 0 ? ONE_PASS_THREADS : ROWS == 0 ? ATTENTION_THREADS : GLOBAL_THREADS, 1)
    attention_kernel(AttentionTask<float> task, const float* similarities, Storage storage, Placement place,
                     unsigned char* workspace) {
  PK_DYNAMIC_SHARED(memory);
  Solver<(ROWS > 0 ? ROWS : 0), TokenCost> solver;
  Problem& problem = solver.problem;
  TokenCost& cost = solver.cost;
  const CostTask<float>& shape = task.cost;
  Carver fast{memory};
  cost.carve(fast, shape.rows);
  settle<ROWS == GLOBAL_ROWS>(problem, solver.peers, place, fast, workspace, shape.rows, shape.cols);
  Inputs in{};
  in.epsilon = float(task.epsilon), in.tau_a = in.tau_b = task.mass > 0 ? 1.0f : float(task.tau);
  in.mass = float(task.mass), in.tol = float(task.tol), in.max_iters = task.max_iters;
  const int end = problem.first + problem.m;
  for (int64_t h = blockIdx.x / place.team; h < shape.samples * shape.heads; h += place.teams) {
    const int64_t b = h / shape.heads;
    const Head head(task, storage, h);
    cost.begin(shape, similarities, b);
    keep_rows(head, shape.row_mask ? shape.row_mask + b * shape.rows : nullptr, shape.rows, cost.m, problem.first, problem.m);
    if (cost.n == 0) continue;
    problem.n = cost.n;
    if (ROWS <= 0) problem.row_stride = int(round_to(cost.n, 2 * QUAD));
    cost.weigh_time(shape.gamma, problem.first, end, solver.peers, problem.scratch);
    cost.find_means(head.attention, storage, problem.first, end, solver.peers);
    solver.begin(in);
    Range range = solver.see_cost();
    cost.low = range.low, cost.inverse = 1.0f / max(range.high - range.low, RANGE_FLOOR);
    range.high = (range.high - range.low) * cost.inverse, range.low = 0;
    const Outcome outcome = solver.solve(in, range);
    if (outcome.residual == outcome.residual) fuse(solver, head, outcome.residual);
    else fill_nan(head, problem, cost);
  }
  if (place.meeting == Meeting::cluster) cluster_sync();  // others may still read this block's shared memory
}

constexpr int GRADIENT_THREADS = 256;

// attention_bar = refined (refined_bar - sum_j refined refined_bar) / (attention + c), a warp a row.
__global__ void __launch_bounds__(GRADIENT_THREADS) fusion_gradient_kernel(FusionGradientTask<float> task, Storage storage) {
  const int64_t row = int64_t(blockIdx.x) * (GRADIENT_THREADS / WARP) + threadIdx.x / WARP;
  if (row >= task.samples * task.heads * task.rows) return;
  const int lane = threadIdx.x % WARP;
  const bool selected = !task.row_mask || task.row_mask[row / (task.rows * task.heads) * task.rows + row % task.rows];
  const int64_t begin = row * task.cols, end = begin + task.cols;
  float dot = 0;
  for (int64_t j = begin + lane; j < end && selected; j += WARP)
    dot = fmaf(load_stored(task.grad, storage, j), load_stored(task.refined, storage, j), dot);
  __syncwarp();
  dot = warp_sum(dot);
  for (int64_t j = begin + lane; j < end; j += WARP) {
    const float grad = load_stored(task.grad, storage, j);
    const float slope = load_stored(task.refined, storage, j) / (load_stored(task.attention, storage, j) + FLOOR);
    store_rounded(task.result, storage, j, selected ? slope * (grad - dot) : grad);
  }
}

const char* refusal(const AttentionTask<float>& task) {
  if (task.cost.rows * task.cost.cols > 0x7fffffff / 8) return "more than 2^28 entries a head";
  return nullptr;
}
cudaError_t find_place(const AttentionTask<float>& task, const CudaCall& call, Placement& found) {
  const CostTask<float>& shape = task.cost;
  Limits limits;
  const cudaError_t error = limits_of(call.device, limits);
  if (error != cudaSuccess) return error;
  found = place(needs_of(shape.rows), shape.rows, shape.cols, shape.samples * shape.heads, limits);
  return cudaSuccess;
}
size_t similarity_bytes(const CostTask<float>& shape) { return size_t(round_to(shape.samples * shape.rows * shape.cols * 4, 256)); }
bool is_empty(const CostTask<float>& shape) { return shape.samples * shape.heads * shape.rows * shape.cols == 0; }

}  // namespace

size_t cuda_transport_attention_workspace(const AttentionTask<float>& task, const CudaCall& call) {
  Placement found;
  if (is_empty(task.cost) || refusal(task) != nullptr || find_place(task, call, found) != cudaSuccess || found.team == 0) return 0;
  return similarity_bytes(task.cost) + Workspace(found).bytes();
}

const char* cuda_transport_attention(const AttentionTask<float>& task, const CudaCall& call) {
  if (is_empty(task.cost)) return nullptr;
  if (const char* reason = refusal(task)) return reason;
  return on_device(call.device, [&] {
    Placement found;
    cudaError_t error = find_place(task, call, found);
    if (error == cudaSuccess && found.team == 0) error = cudaErrorInvalidConfiguration;
    auto* const similarities = static_cast<float*>(call.workspace);
    if (error == cudaSuccess) error = similarity(task.cost, call, similarities);
    auto* const workspace = static_cast<unsigned char*>(call.workspace) + similarity_bytes(task.cost);
    const size_t counters = Workspace(found).counters;
    if (error == cudaSuccess && counters > 0) error = clear(workspace, counters, call.stream);
    if (error != cudaSuccess) return error;
    const Launch where = launch_of(found, call.stream);
    switch (found.rows_template) {
      case 40:
        return launch(attention_kernel<40>, where, task, similarities, call.storage, found, workspace);
      case 0:
        return launch(attention_kernel<0>, where, task, similarities, call.storage, found, workspace);
      default:
        return launch(attention_kernel<GLOBAL_ROWS>, where, task, similarities, call.storage, found, workspace);
    }
  });
}

const char* cuda_fusion_gradient(const FusionGradientTask<float>& task, const CudaCall& call) {
  const int64_t rows = task.samples * task.heads * task.rows, a_block = GRADIENT_THREADS / WARP;
  if (rows * task.cols == 0) return nullptr;
  return on_device(call.device, [&] {
    const Launch where{dim3(unsigned((rows + a_block - 1) / a_block)), dim3(GRADIENT_THREADS), 0, call.stream};
    return launch(fusion_gradient_kernel, where, task, call.storage);
  });
}

}  // namespace pk
