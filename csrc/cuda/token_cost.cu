// The token cost of every head, written out: what transport attention keeps on chip.
#include "host.h"
#include "token_cost.cuh"

namespace pk {
namespace {

using namespace device;

constexpr int THREADS = 256;

struct Team {  // the blocks of a head
  unsigned count;
  int cols_block;
  size_t shared_bytes;
};

__host__ __device__ int64_t slots_of(int64_t rows) { return slot_floats(int(round_to(rows, 2 * QUAD))); }

__global__ void __launch_bounds__(THREADS)
    token_cost_kernel(CostTask<float> task, const float* similarities, Storage storage, Team team) {
  PK_DYNAMIC_SHARED(memory);
  PK_SHARED(float, scratch, THREADS / WARP);
  TokenCost cost;
  Carver fast{memory};
  cost.carve(fast, task.rows);
  Peers peers{};
  peers.meeting = team.count > 1 ? Meeting::cluster : Meeting::block, peers.count = team.count;
  peers.rank = blockIdx.x % team.count, peers.slot_floats = int(slots_of(task.rows));
  peers.slots = fast.floats(2 * peers.slot_floats);
  const int64_t h = blockIdx.x / team.count, b = h / task.heads, entry = h * task.rows * task.cols;
  const int M = int(task.cols), begin = min(int(peers.rank) * team.cols_block, M), end = min(begin + team.cols_block, M);
  cost.begin(task, similarities, b);
  cost.weigh_time(task.gamma, begin, end, peers, scratch);
  const int64_t bytes = entry * (storage == Storage::float32 ? 4 : 2);
  cost.find_means(reinterpret_cast<const char*>(task.attention) + bytes, storage, begin, end, peers);
  float low = INFINITY, high = -INFINITY, zero = 0;
  if (task.normalize) {
    for (int j = begin + int(threadIdx.x); j < end; j += THREADS) {
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
  const float divisor = task.normalize ? max(high - low, 1e-6f) : 1.0f, least = task.normalize ? low : 0.0f;
  for (int j = begin + int(threadIdx.x); j < end; j += THREADS) {
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

const char* plan_team(const CostTask<float>& task, const Limits& limits, Team& team) {
  constexpr int ENOUGH = 512;  // columns of a block
  team.count = 1;
  while (limits.compute_major >= 9 && team.count < 8 && task.cols >= int64_t(team.count) * 2 * ENOUGH) team.count *= 2;
  team.cols_block = int((task.cols + team.count - 1) / team.count);
  team.shared_bytes = TokenCost::shared_bytes(task.rows) + 2 * size_t(slots_of(task.rows)) * sizeof(float);
  if (team.shared_bytes + 1024 > size_t(limits.shared_block)) return "too many rows for shared memory; use backend='reference'";
  if (task.samples * task.heads * team.count > 0x7fffffff || task.rows * task.cols > 0x7fffffff / 8)
    return "more than 2^28 entries a head, or 2^31 heads";
  return nullptr;
}
bool is_empty(const CostTask<float>& task) { return task.samples * task.heads * task.rows * task.cols == 0; }

}  // namespace

size_t cuda_token_cost_workspace(const CostTask<float>& task, const CudaCall&) {
  return size_t(task.samples * task.rows * task.cols) * sizeof(float);
}

const char* cuda_token_cost(const CostTask<float>& task, const CudaCall& call) {
  if (is_empty(task)) return nullptr;
  Limits limits;
  Team team;
  const char* reason = nullptr;
  const char* message = on_device(call.device, [&] {
    auto* const similarities = static_cast<float*>(call.workspace);
    cudaError_t error = limits_of(call.device, limits);
    if (error == cudaSuccess) reason = plan_team(task, limits, team);
    if (error == cudaSuccess && reason == nullptr) error = similarity(task, call, similarities);
    if (error != cudaSuccess || reason != nullptr) return error;
    Launch where{dim3(unsigned(task.samples * task.heads) * team.count), dim3(THREADS), team.shared_bytes, call.stream};
    where.cluster = team.count;
    return launch(token_cost_kernel, where, task, similarities, call.storage, team);
  });
  return reason ? reason : message;
}

}  // namespace pk
