// Half iterations without exponentials: K stays where it is, the scalings move.
//
//   lu_i = (tau_a - 1) k f_i - tau_a log2 sum_j K_ij v_j b_j      and the same for columns.
//
// Columns are updated and the next row sums formed in one go. With ROWS > 0 all rows of a column pass through the registers of
// one thread, and each element of K is read once an iteration; otherwise it is read twice.
#pragma once
#include "problem.cuh"

namespace pk {
namespace device {

// Logs (base 2) of scalings outside of these are absorbed into the references; sums outside of theirs are not trusted.
constexpr float SCALING_LOW = -69.0f, SCALING_HIGH = 34.5f, SUM_LOW = 1e-18f, SUM_HIGH = 1e10f;
constexpr float WIDE = 1, BAD = 2;  // trouble: absorb; what was computed is no use

// What updates have met: the largest change of a log scaling, and the worst trouble.
struct Votes {
  float moved = 0, trouble = 0;
  __device__ void join(float2 other) { moved = max(moved, other.x), trouble = max(trouble, other.y); }
  __device__ void across_warp() { moved = warp_max(moved), trouble = warp_max(trouble); }
};
// The same while one thread goes through its entries. No sum is NaN: K is finite and what it is multiplied by is, too.
struct Seen {
  float moved = 0, sum_low = 1, sum_high = 1, log_low = 0, log_high = 0;
  // New log scaling of an entry; padding has the sum 1.
  __device__ float update(float sum, float old, float damping, float tau) {
    const float l = fmaf(-tau, log2_approx(sum), damping);
    sum_low = min(sum_low, sum), sum_high = max(sum_high, sum), log_low = min(log_low, l), log_high = max(log_high, l);
    moved = max(moved, fabsf(l - old));
    return l;
  }
  __device__ Votes votes() const {
    Votes votes;
    votes.moved = moved;
    if (!(log_low >= SCALING_LOW && log_high <= SCALING_HIGH)) votes.trouble = WIDE;
    if (!(sum_low >= SUM_LOW && sum_high <= SUM_HIGH)) votes.trouble = BAD;
    return votes;
  }
};
// New log scaling of entry i of a side from its sum, into next: returns weight times scaling.
__device__ inline float update(const Side& side, int i, float sum, Seen& seen) {
  const float4 entry = side.entries[i];  // one load
  const float old = side.turned ? entry.w : entry.z;
  const float l = seen.update(exists(entry.x) ? sum : 1.0f, old, entry.y, side.tau);
  side.next(i) = l;
  return entry.x * exp2_approx(l);
}

// Put votes of all warps where the whole block can read them after a barrier.
__device__ inline void cast(Votes votes, float2* box) {
  votes.across_warp();
  if (threadIdx.x % WARP == 0) box[threadIdx.x / WARP] = make_float2(votes.moved, votes.trouble);
}
__device__ inline Votes count(const float2* box) {
  Votes votes;
  for (unsigned warp = 0; warp < blockDim.x / WARP; ++warp) votes.join(box[warp]);
  return votes;
}

// Columns and row sums in one pass over K; the sums of each warp go to problem.partial. Unless it `moves` them the columns stay.
template <int ROWS> __device__ inline void one_pass(const Problem& problem, bool moves, Seen& seen) {
  constexpr int QUADS = ROWS / QUAD;
  const Side& cols = problem.cols;
  float4 u[QUADS], k[QUADS];
  float sums[ROWS];
#pragma unroll
  for (int q = 0; q < QUADS; ++q) u[q] = reinterpret_cast<const float4*>(&problem.rows.scaled(0))[q];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) sums[i] = 0;
  const int step = blockDim.x, end = problem.col_stride;  // a multiple of 32: a warp has 32 columns or none
  for (int j = threadIdx.x; j < end; j += step) {
    const float4* const column = problem.K + Problem::quad(QUADS, 0, j);
#pragma unroll
    for (int q = 0; q < QUADS; ++q) k[q] = column[q * WARP];
    float v;
    if (moves) {
      float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma unroll
      for (int q = 0; q < QUADS; ++q) {
        s0 = fmaf(k[q].x, u[q].x, s0), s1 = fmaf(k[q].y, u[q].y, s1);
        s2 = fmaf(k[q].z, u[q].z, s2), s3 = fmaf(k[q].w, u[q].w, s3);
      }
      v = update(cols, j, (s0 + s1) + (s2 + s3), seen);
    } else {
      v = cols.scaled(j);
    }
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
      sums[4 * q] = fmaf(k[q].x, v, sums[4 * q]), sums[4 * q + 1] = fmaf(k[q].y, v, sums[4 * q + 1]);
      sums[4 * q + 2] = fmaf(k[q].z, v, sums[4 * q + 2]), sums[4 * q + 3] = fmaf(k[q].w, v, sums[4 * q + 3]);
    }
  }
  float* const mine = problem.partial + int(threadIdx.x / WARP) * problem.row_stride;
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int group = 0; group < ROWS; group += 8) {
    float eight[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) eight[r] = sums[group + r];
    const float total = transpose_sum(eight);
    if (lane % 4 == 0) mine[group + lane / 4] = total;
  }
}

// The same for any number of rows: a thread a column, then a warp eight rows. Row sums of this block go to `result`.
__device__ inline void two_passes(const Problem& problem, bool moves, Seen& seen, float* result) {
  const Side& cols = problem.cols;
  const int quads = problem.row_stride / QUAD, stride = problem.col_stride;
  if (moves) {
    const float4* const u = reinterpret_cast<const float4*>(&problem.rows.scaled(0));
    for (int j = threadIdx.x; j < stride; j += blockDim.x) {
      const float4* const column = problem.K + Problem::quad(quads, 0, j);
      float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma unroll 4
      for (int q = 0; q < quads; ++q) {
        const float4 x = u[q], k = column[q * WARP];
        s0 = fmaf(k.x, x.x, s0), s1 = fmaf(k.y, x.y, s1), s2 = fmaf(k.z, x.z, s2), s3 = fmaf(k.w, x.w, s3);
      }
      cols.scaled(j) = update(cols, j, (s0 + s1) + (s2 + s3), seen);
    }
    __syncthreads();
  }
  const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  for (int q = 2 * int(threadIdx.x / WARP); q < quads; q += 2 * warps) {  // row_stride is a multiple of 8
    const float4* tile = problem.K + Problem::quad(quads, q, lane);
    float sums[8] = {};
#pragma unroll 4
    for (int j = lane; j < stride; j += WARP, tile += quads * WARP) {
      const float v = cols.scaled(j);
      const float4 x = tile[0], y = tile[WARP];
      sums[0] = fmaf(x.x, v, sums[0]), sums[1] = fmaf(x.y, v, sums[1]), sums[2] = fmaf(x.z, v, sums[2]);
      sums[3] = fmaf(x.w, v, sums[3]), sums[4] = fmaf(y.x, v, sums[4]), sums[5] = fmaf(y.y, v, sums[5]);
      sums[6] = fmaf(y.z, v, sums[6]), sums[7] = fmaf(y.w, v, sums[7]);
    }
    const float total = transpose_sum(sums);
    if (lane % 4 == 0) result[q * QUAD + lane / 4] = total;
  }
}

// Columns (if it `moves` them), then the row sums over all blocks in problem.sum. Entry i is written by the thread that reads it in
// `scale_rows`. Returns what all columns of all blocks voted.
template <int ROWS> __device__ inline Votes scale_columns(const Problem& problem, bool moves, Peers& peers) {
  Seen seen;
  float* const slot = peers.slot();
  if constexpr (ROWS > 0) {
    one_pass<ROWS>(problem, moves, seen);
    cast(seen.votes(), problem.votes(true));
    __syncthreads();
    float* const sums = peers.count == 1 ? problem.sum : slot;
    const int warps = blockDim.x / WARP;
    for (int i = threadIdx.x; i < ROWS; i += blockDim.x) {
      float total = 0;
      for (int warp = 0; warp < warps; ++warp) total += problem.partial[warp * problem.row_stride + i];
      sums[i] = total;
    }
  } else {
    two_passes(problem, moves, seen, peers.count == 1 ? problem.sum : slot);
    cast(seen.votes(), problem.votes(true));
    __syncthreads();
  }
  Votes votes = count(problem.votes(true));
  if (peers.count == 1) return votes;
  if (threadIdx.x == 0) slot[problem.row_stride] = votes.moved, slot[problem.row_stride + 1] = votes.trouble;
  peers.sync();
  for (int i = threadIdx.x; i < problem.row_stride; i += blockDim.x) {
    float total = 0;
    for (unsigned other = 0; other < peers.count; ++other) total += peers.slot_of(other)[i];
    problem.sum[i] = total;
  }
  votes = Votes();
  for (unsigned other = threadIdx.x % WARP; other < peers.count; other += WARP) {
    const float* const theirs = peers.slot_of(other) + problem.row_stride;
    votes.join(make_float2(theirs[0], theirs[1]));
  }
  votes.across_warp();
  peers.flip();
  return votes;
}

// Rows from their sums, into next and scaled; `accept` makes them count.
__device__ inline Votes scale_rows(const Problem& problem) {
  const Side& rows = problem.rows;
  Seen seen;
  for (int i = threadIdx.x; i < problem.row_stride; i += blockDim.x)
    rows.scaled(i) = update(rows, i, problem.sum[i], seen);
  cast(seen.votes(), problem.votes(false));
  __syncthreads();
  return count(problem.votes(false));
}
// The new log scalings of a side take the place of the old ones.
__device__ inline void accept(Side& side) { side.turned = !side.turned; }

}  // namespace device
}  // namespace pk
