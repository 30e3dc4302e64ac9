// The PISCES cost of one head, entry by entry, and what it needs of a row: its expected time and place under the attention.
//
//   raw_ij = 1 - cosine(text_i, video_j) + time_weight |t_i - frame_j| + place_weight |p_i - position_j|
#pragma once
#include "problem.cuh"

namespace pk {

cudaError_t similarity(const CostTask<float>& task, const CudaCall& call, float* result);  // similarity.cu

namespace device {

constexpr float RANGE_FLOOR = 1e-6f;  // of what costs and sums of attention are divided by

// A Cost (log_domain.cuh) of (raw - low) inverse. Rows are those that are selected.
struct TokenCost {
  const float* semantic;   // [N, M], 1 - cosine of all rows of the sample
  const float *frame;      // [M]
  const float* positions;  // [M, 2]
  const uint8_t* col_mask;  // [M] or null
  float4* means;           // [n] expected frame, y, x; sum of the attention. Shared memory
  int* rows;               // [n] where a selected row lies in the sample. Shared memory
  int n, m;
  float time_weight, place_weight, low, inverse;

  struct Place {  // of a column
    float frame, y, x;
  };
  struct Column {
    const TokenCost& cost;
    const float* semantic;
    Place place;
    __device__ float at(int i) const {
      return (cost.raw(i, place, __ldg(semantic + cost.rows[i] * cost.m)) - cost.low) * cost.inverse;
    }
  };
  __device__ Place place(int j) const { return {__ldg(frame + j), __ldg(positions + 2 * j), __ldg(positions + 2 * j + 1)}; }
  __device__ Column column(int j) const { return {*this, semantic + j, place(j)}; }
  // semantic: 1 - cosine of the entry. Every product is inside of an fma: all who compute an entry get the same bits.
  __device__ float raw(int i, const Place& place, float semantic) const {
    const float4 mean = means[i];
    const float dy = mean.y - place.y, dx = mean.z - place.x;
    const float distance = sqrt_approx(fmaf(dy, dy, fmaf(dx, dx, 0.0f)));
    return fmaf(place_weight, distance, fmaf(time_weight, fabsf(mean.x - place.frame), semantic));
  }
  __device__ bool col_exists(int j) const { return col_mask == nullptr || col_mask[j]; }

  // Shared memory for so many rows.
  __host__ __device__ void carve(Carver& fast, int64_t all_rows) {
    means = reinterpret_cast<float4*>(fast.floats(4 * all_rows)), rows = reinterpret_cast<int*>(fast.floats(all_rows));
  }
  static size_t shared_bytes(int64_t all_rows) {
    alignas(16) static unsigned char nowhere[16];  // only counted
    Carver fast{nowhere};
    TokenCost().carve(fast, all_rows);
    return fast.used;
  }
  // A head of sample b; the scaling is left open. Without similarities there are no columns. All threads.
  __device__ void begin(const CostTask<float>& task, const float* similarities, int64_t b) {
    const int64_t N = task.rows, M = task.cols;
    m = int(M), semantic = similarities ? similarities + b * N * M : nullptr, frame = task.frame + b * M, positions = task.positions + 2 * b * M;
    col_mask = task.col_mask ? task.col_mask + b * M : nullptr;
    place_weight = task.place_weight, low = 0, inverse = 1;
    __syncthreads();  // the last head has been read
    n = select(task.row_mask ? task.row_mask + b * N : nullptr, int(N));
    __syncthreads();
  }
  // List the rows that exist. Every warp counts, the first one writes.
  __device__ int select(const uint8_t* mask, int all) {
    const int lane = threadIdx.x % WARP;
    int count = 0;
    for (int first = 0; first < all; first += WARP) {
      const int i = first + lane;
      const bool there = i < all && (mask == nullptr || mask[i]);
      const unsigned chosen = __ballot_sync(ALL_LANES, there);
      if (there && threadIdx.x < WARP) rows[count + __popc(chosen & ((1u << lane) - 1))] = i;
      count += __popc(chosen);
    }
    return count;
  }
  // time_weight = gamma / (last frame - first frame); 1 for a range of 0. Columns [begin, end) are those of this block.
  __device__ void weigh_time(float gamma, int begin, int end, Peers& peers, float* scratch) {
    float first = INFINITY, last = -INFINITY;
    for (int j = begin + int(threadIdx.x); j < end; j += blockDim.x) {
      if (!col_exists(j)) continue;
      const float t = __ldg(frame + j);
      first = min(first, t), last = max(last, t);
    }
    const float range = peers.maximum(last, scratch) + peers.maximum(-first, scratch);
    time_weight = gamma / (range > 0 ? range : 1.0f);
  }
  // Expected time and place of every selected row under the attention [N, M] of the head.
  __device__ void find_means(const void* attention, Storage storage, int begin, int end, Peers& peers) {
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    float4* const mine = reinterpret_cast<float4*>(peers.slot());
    for (int i = threadIdx.x / WARP; i < n; i += warps) {
      float total = 0, t = 0, y = 0, x = 0;
      const int row = rows[i] * m;
      for (int j = begin + lane; j < end; j += WARP) {
        if (!col_exists(j)) continue;
        const float w = load_stored(attention, storage, row + j);
        total += w, t = fmaf(w, __ldg(frame + j), t);
        y = fmaf(w, __ldg(positions + 2 * j), y), x = fmaf(w, __ldg(positions + 2 * j + 1), x);
      }
      total = warp_sum(total), t = warp_sum(t), y = warp_sum(y), x = warp_sum(x);
      if (lane == 0) mine[i] = make_float4(t, y, x, total);
    }
    peers.sync();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      float4 sum = make_float4(0, 0, 0, 0);
      for (unsigned other = 0; other < peers.count; ++other) {
        const float4 part = reinterpret_cast<const float4*>(peers.slot_of(other))[i];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      const float scale = 1.0f / max(sum.w, RANGE_FLOOR);
      means[i] = make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w);
    }
    peers.flip();
    __syncthreads();
  }
};

constexpr int HEAD_THREADS = 256;

// The blocks that work on one head, each on a part of the columns.
struct HeadTeam {
  unsigned count;
  int cols_block;
  size_t shared_bytes;

  __host__ __device__ static int slots_of(int64_t rows) { return slot_floats(int(round_to(rows, 2 * QUAD))); }
  // After what takes the first `own` bytes of shared memory.
  const char* plan(const CostTask<float>& task, const Limits& limits, size_t own) {
    constexpr int ENOUGH = 512;  // columns of a block
    count = 1;
    while (limits.compute_major >= 9 && count < 8 && task.cols >= int64_t(count) * 2 * ENOUGH) count *= 2;
    cols_block = int((task.cols + count - 1) / count);
    shared_bytes = own + 2 * size_t(slots_of(task.rows)) * sizeof(float);
    if (shared_bytes + 1024 > size_t(limits.shared_block)) return "too many rows for shared memory; use backend='reference'";
    if (task.samples * task.heads * count > 0x7fffffff || task.rows * task.cols > 0x7fffffff / 8)
      return "more than 2^28 entries a head, or 2^31 heads";
    return nullptr;
  }
  __device__ Peers peers(Carver& fast, int64_t rows) const {
    Peers peers{};
    peers.meeting = count > 1 ? Meeting::cluster : Meeting::block, peers.count = count;
    peers.rank = blockIdx.x % count, peers.slot_floats = slots_of(rows);
    peers.slots = fast.floats(2 * peers.slot_floats);
    return peers;
  }
};

}  // namespace device
}  // namespace pk
