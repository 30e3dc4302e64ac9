// Gradient of the token cost with respect to the attention and to the cosines; that of the features is two matrix products away.
//
// A cluster or block a head: the gradient of its min-max scaling, then of the expected times and places of its rows. A second
// launch adds up the heads of a sample, whose cosines are the same.
#include "host.h"
#include "token_cost.cuh"

namespace pk {
namespace {

using namespace device;

// The gradient of the raw cost: scale * grad, and at_low and at_high more at the entries at 0 and at 1, which share what moves the
// extremes.
struct ScalingGradient {
  float scale, at_low, at_high;
  __device__ float of(float grad, float cost) const {
    return __fmul_rn(scale, grad) + (cost == 0.0f ? at_low : cost == 1.0f ? at_high : 0.0f);  // not fused: both may be the same
  }
};

struct Head {
  const CostGradientTask<float>& task;
  Storage storage;
  TokenCost cost;
  Peers peers;
  float* scratch;  // shared, a float a warp
  int64_t sample, entry;
  int begin, end;  // columns of this block

  __device__ Head(const CostGradientTask<float>& task_, Storage storage_) : task(task_), storage(storage_) {}

  __device__ int64_t at(int i, int j) const { return entry + int64_t(cost.rows[i]) * cost.m + j; }

  // Before the scaling, as the forward kernel has it up to rounding. A warp; i counts the selected rows.
  __device__ float raw(int i, int j) const {
    const CostTask<float>& of = task.cost;
    const int64_t text = (sample * of.rows + cost.rows[i]) * of.dim, video = (sample * of.cols + j) * of.dim;
    float dot = 0, left = 0, right = 0;
    for (int64_t d = threadIdx.x % WARP; d < of.dim; d += WARP) {
      const float x = load_stored(of.text, storage, text + d), y = load_stored(of.video, storage, video + d);
      dot = fmaf(x, y, dot), left = fmaf(x, x, left), right = fmaf(y, y, right);
    }
    dot = warp_sum(dot), left = sqrtf(warp_sum(left)), right = sqrtf(warp_sum(right));
    return cost.raw(i, cost.place(j), 1.0f - dot / max(left, 1e-12f) / max(right, 1e-12f));
  }
  // Sums over all entries of the head, and where the last extremes lie (as i M + j of the selected rows; -1: nowhere).
  struct Sums {
    float grad, grad_cost, lows, highs;
    int low, high;
  };
  // Of those of all threads; by_warp: shared, for every warp. All threads of all blocks.
  __device__ Sums add(Sums sums, Sums* by_warp) {
    sums = {warp_sum(sums.grad), warp_sum(sums.grad_cost), warp_sum(sums.lows), warp_sum(sums.highs), warp_max(sums.low), warp_max(sums.high)};
    if (threadIdx.x % WARP == 0) by_warp[threadIdx.x / WARP] = sums;
    __syncthreads();
    const auto join = [](Sums& to, const Sums& more) {
      to.grad += more.grad, to.grad_cost += more.grad_cost, to.lows += more.lows, to.highs += more.highs;
      to.low = max(to.low, more.low), to.high = max(to.high, more.high);
    };
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < HEAD_THREADS / WARP; ++warp) join(sums, by_warp[warp]);
      *reinterpret_cast<Sums*>(peers.slot()) = sums;
    }
    peers.sync();
    sums = *reinterpret_cast<const Sums*>(peers.slot_of(0));
    for (unsigned other = 1; other < peers.count; ++other) join(sums, *reinterpret_cast<const Sums*>(peers.slot_of(other)));
    peers.flip();
    return sums;
  }
  __device__ ScalingGradient scaling_gradient() {
    PK_SHARED(Sums, by_warp, HEAD_THREADS / WARP);
    Sums sums{0, 0, 0, 0, -1, -1};
    for (int j = begin + int(threadIdx.x); j < end; j += HEAD_THREADS) {
      if (!cost.col_exists(j)) continue;
#pragma unroll 1
      for (int i = 0; i < cost.n; ++i) {
        const float grad = __ldg(task.grad + at(i, j)), c = __ldg(task.cost.cost + at(i, j));
        sums.grad += grad, sums.grad_cost = fmaf(grad, c, sums.grad_cost);
        if (c == 0.0f) sums.lows += 1, sums.low = i * cost.m + j;
        if (c == 1.0f) sums.highs += 1, sums.high = i * cost.m + j;
      }
    }
    sums = add(sums, by_warp);
    const int low = sums.low, high = sums.high < 0 ? low : sums.high;  // no highest entry: the range is at its floor
    if (low < 0) return {NAN, NAN, NAN};  // nothing exists, or not all of it is finite
    const int warp = threadIdx.x / WARP, chosen = warp == 0 ? low : high;
    const float extreme = warp < 2 ? raw(chosen / cost.m, chosen % cost.m) : 0.0f;
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[warp] = extreme;
    __syncthreads();
    const float span = scratch[1] - scratch[0], scale = 1.0f / max(span, RANGE_FLOOR);
    const float to_divisor = span > RANGE_FLOOR ? -sums.grad_cost * scale : 0.0f, to_low = -sums.grad * scale - to_divisor;
    return {scale, to_low / sums.lows, to_divisor / max(sums.highs, 1.0f)};
  }
  // Gradient of the expected frame, y and x of every selected row, divided by the sum of the attention; last: what they are
  // multiplied by in the gradient of that sum.
  __device__ void find_gradients_of_means(const ScalingGradient& scaling, float4* results) {
    const int lane = threadIdx.x % WARP;
    float4* const mine = reinterpret_cast<float4*>(peers.slot());
    for (int i = threadIdx.x / WARP; i < cost.n; i += HEAD_THREADS / WARP) {
      const float4 mean = cost.means[i];
      float t = 0, y = 0, x = 0;
      for (int j = begin + lane; j < end; j += WARP) {
        if (!cost.col_exists(j)) continue;
        const float grad = scaling.of(__ldg(task.grad + at(i, j)), __ldg(task.cost.cost + at(i, j)));
        const TokenCost::Place column = cost.place(j);
        const float dt = mean.x - column.frame, dy = mean.y - column.y, dx = mean.z - column.x;
        const float squared = fmaf(dy, dy, dx * dx), along = squared > 0 ? grad * reciprocal_approx(sqrt_approx(squared)) : 0.0f;
        t += dt > 0 ? grad : dt < 0 ? -grad : 0.0f, y = fmaf(along, dy, y), x = fmaf(along, dx, x);
      }
      t = warp_sum(t), y = warp_sum(y), x = warp_sum(x);
      if (lane == 0) mine[i] = make_float4(t, y, x, 0);
    }
    peers.sync();
    for (int i = threadIdx.x; i < cost.n; i += HEAD_THREADS) {
      float t = 0, y = 0, x = 0;
      for (unsigned other = 0; other < peers.count; ++other) {
        const float4 part = reinterpret_cast<const float4*>(peers.slot_of(other))[i];
        t += part.x, y += part.y, x += part.z;
      }
      const float4 mean = cost.means[i];
      const float scale = 1.0f / max(mean.w, RANGE_FLOOR);
      t *= cost.time_weight * scale, y *= cost.place_weight * scale, x *= cost.place_weight * scale;
      const float along = mean.w < RANGE_FLOOR ? 0.0f : fmaf(t, mean.x, fmaf(y, mean.y, x * mean.z));
      results[i] = make_float4(t, y, x, along);
    }
    peers.flip();
    __syncthreads();
  }
};

__global__ void __launch_bounds__(HEAD_THREADS)
    head_gradient_kernel(const __grid_constant__ CostGradientTask<float> task, Storage storage, HeadTeam team, ScalingGradient* scalings) {
  PK_DYNAMIC_SHARED(memory);
  PK_SHARED(float, scratch, HEAD_THREADS / WARP);
  const CostTask<float>& of = task.cost;
  const int64_t h = blockIdx.x / team.count, b = h / of.heads, entry = h * of.rows * of.cols;
  Carver fast{memory};
  Head head(task, storage);
  head.cost.carve(fast, of.rows);
  float4* const to_means = reinterpret_cast<float4*>(fast.floats(4 * of.rows));
  head.peers = team.peers(fast, of.rows), head.scratch = scratch, head.sample = b, head.entry = entry;
  const int M = int(of.cols);
  head.begin = min(int(head.peers.rank) * team.cols_block, M), head.end = min(head.begin + team.cols_block, M);
  TokenCost& cost = head.cost;
  cost.begin(of, nullptr, b);
  cost.weigh_time(of.gamma, head.begin, head.end, head.peers, scratch);
  const int64_t bytes = entry * (storage == Storage::float32 ? 4 : 2);
  cost.find_means(reinterpret_cast<const char*>(of.attention) + bytes, storage, head.begin, head.end, head.peers);
  ScalingGradient scaling{1, 0, 0};
  if (of.normalize) scaling = head.scaling_gradient();
  if (threadIdx.x == 0 && head.peers.rank == 0) scalings[h] = scaling;
  head.find_gradients_of_means(scaling, to_means);
  for (int j = head.begin + int(threadIdx.x); j < head.end; j += HEAD_THREADS) {
    const bool there = cost.col_exists(j);
    const TokenCost::Place column = cost.place(j);
    int next = 0;
    for (int i = 0; i < of.rows; ++i) {
      float result = 0;
      if (next < cost.n && cost.rows[next] == i) {
        const float4 to_mean = to_means[next++];
        if (there) result = fmaf(to_mean.x, column.frame, fmaf(to_mean.y, column.y, to_mean.z * column.x)) - to_mean.w;
      }
      task.attention[entry + int64_t(i) * M + j] = result;
    }
  }
  if (team.count > 1) cluster_sync();  // others may still read this block's shared memory
}

// A thread an entry of a sample: minus the sum over its heads.
__global__ void __launch_bounds__(HEAD_THREADS)
    cosine_gradient_kernel(const __grid_constant__ CostGradientTask<float> task, const ScalingGradient* scalings) {
  const CostTask<float>& of = task.cost;
  const int64_t b = blockIdx.y, entries = of.rows * of.cols, k = int64_t(blockIdx.x) * HEAD_THREADS + threadIdx.x;
  if (k >= entries) return;
  const int64_t i = k / of.cols, j = k - i * of.cols;
  float sum = 0;
  if ((of.row_mask == nullptr || of.row_mask[b * of.rows + i]) && (of.col_mask == nullptr || of.col_mask[b * of.cols + j])) {
    const int64_t first = b * of.heads;
    for (int64_t h = first; h < first + of.heads; ++h)
      sum -= scalings[h].of(__ldg(task.grad + h * entries + k), __ldg(of.cost + h * entries + k));
  }
  task.cosine[b * entries + k] = sum;
}

}  // namespace

size_t cuda_token_cost_gradient_workspace(const CostGradientTask<float>& task, const CudaCall&) {
  return size_t(task.cost.samples * task.cost.heads) * sizeof(ScalingGradient);
}

const char* cuda_token_cost_gradient(const CostGradientTask<float>& task, const CudaCall& call) {
  const CostTask<float>& of = task.cost;
  const int64_t entries = of.rows * of.cols;
  if (of.samples * of.heads * entries == 0) return nullptr;
  if (of.samples > 65535) return "more than 65535 samples; use smaller batches";
  Limits limits;
  HeadTeam team;
  const char* reason = nullptr;
  const char* message = on_device(call.device, [&] {
    auto* const scalings = static_cast<ScalingGradient*>(call.workspace);
    cudaError_t error = limits_of(call.device, limits);
    const size_t to_means = size_t(of.rows) * sizeof(float4);
    if (error == cudaSuccess) reason = team.plan(of, limits, TokenCost::shared_bytes(of.rows) + to_means);
    if (error != cudaSuccess || reason != nullptr) return error;
    Launch heads{dim3(unsigned(of.samples * of.heads) * team.count), dim3(HEAD_THREADS), team.shared_bytes, call.stream};
    heads.cluster = team.count;
    error = launch(head_gradient_kernel, heads, task, call.storage, team, scalings);
    if (error != cudaSuccess) return error;
    const unsigned blocks = unsigned((entries + HEAD_THREADS - 1) / HEAD_THREADS);
    const Launch samples{dim3(blocks, unsigned(of.samples)), dim3(HEAD_THREADS), 0, call.stream};
    return launch(cosine_gradient_kernel, samples, task, scalings);
  });
  return reason ? reason : message;
}

}  // namespace pk
