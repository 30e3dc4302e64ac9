// The token cost of every head, written out: what transport attention keeps on chip.
#include "host.h"
#include "token_cost.cuh"

namespace pk {
namespace {

using namespace device;

__global__ void __launch_bounds__(HEAD_THREADS)
    token_cost_kernel(CostTask<float> task, const float* similarities, Storage storage, HeadTeam team) {
  PK_DYNAMIC_SHARED(memory);
  PK_SHARED(float, scratch, HEAD_THREADS / WARP);
  TokenCost cost;
  Carver fast{memory};
  cost.carve(fast, task.rows);
  Peers peers = team.peers(fast, task.rows);
  const int64_t h = blockIdx.x / team.count, b = h / task.heads, entry = h * task.rows * task.cols;
  const int M = int(task.cols), begin = min(int(peers.rank) * team.cols_block, M), end = min(begin + team.cols_block, M);
  cost.begin(task, similarities, b);
  cost.weigh_time(task.gamma, begin, end, peers, scratch);
  const int64_t bytes = entry * (storage == Storage::float32 ? 4 : 2);
  cost.find_means(reinterpret_cast<const char*>(task.attention) + bytes, storage, begin, end, peers);
  float low = INFINITY, high = -INFINITY, zero = 0;
  if (task.normalize) {
    for (int j = begin + int(threadIdx.x); j < end; j += HEAD_THREADS) {
      if (!cost.col_exists(j)) continue;
      const auto column = cost.column(j);
      for (int i = 0; i < cost.n; ++i) {
        const float raw = column.at(i);
        low = min(low, raw), high = max(high, raw), zero += raw - raw;
      }
    }
    high = peers.maximum(high, scratch), low = -peers.maximum(-low, scratch);
    if (!peers.all(zero == 0, scratch)) low = NAN;
  }
  const float divisor = task.normalize ? max(high - low, RANGE_FLOOR) : 1.0f, least = task.normalize ? low : 0.0f;
  for (int j = begin + int(threadIdx.x); j < end; j += HEAD_THREADS) {
    const bool there = cost.col_exists(j);
    const auto column = cost.column(j);
    int next = 0;
    for (int i = 0; i < task.rows; ++i) {
      const bool selected = next < cost.n && cost.rows[next] == i;
      // A division, so that the largest entry is exactly 1: the gradient looks for it.
      task.cost[entry + int64_t(i) * M + j] = selected && there ? (column.at(next) - least) / divisor : 0.0f;
      next += selected;
    }
  }
  if (team.count > 1) cluster_sync();  // others may still read this block's shared memory
}

bool is_empty(const CostTask<float>& task) { return task.samples * task.heads * task.rows * task.cols == 0; }

}  // namespace

size_t cuda_token_cost_workspace(const CostTask<float>& task, const CudaCall&) {
  return size_t(task.samples * task.rows * task.cols) * sizeof(float);
}

const char* cuda_token_cost(const CostTask<float>& task, const CudaCall& call) {
  if (is_empty(task)) return nullptr;
  Limits limits;
  HeadTeam team;
  const char* reason = nullptr;
  const char* message = on_device(call.device, [&] {
    auto* const similarities = static_cast<float*>(call.workspace);
    cudaError_t error = limits_of(call.device, limits);
    if (error == cudaSuccess) reason = team.plan(task, limits, TokenCost::shared_bytes(task.rows));
    if (error == cudaSuccess && reason == nullptr) error = similarity(task, call, similarities);
    if (error != cudaSuccess || reason != nullptr) return error;
    Launch where{dim3(unsigned(task.samples * task.heads) * team.count), dim3(HEAD_THREADS), team.shared_bytes, call.stream};
    where.cluster = team.count;
    return launch(token_cost_kernel, where, task, similarities, call.storage, team);
  });
  return reason ? reason : message;
}

}  // namespace pk
