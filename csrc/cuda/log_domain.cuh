// Building K from the cost, and half iterations by log-sum-exp for potentials whose kernel matrix a float cannot hold.
//
// A Cost gives the entries of one problem: `cost.column(j)` what depends on the global column j only, `.at(i)` the entry of
// row i in units of the cost. Only entries that exist are asked for.
#pragma once
#include "problem.cuh"

namespace pk {
namespace device {

// log2 sum of exp2 of the values that were added. -inf adds nothing.
struct LogSum {
  float top = -INFINITY, sum = 0;
  __device__ void add(float x) {
    if (x > top) {
      sum = fmaf(sum, exp2_approx(top - x), 1.0f), top = x;
    } else if (x > -INFINITY) {
      sum += exp2_approx(x - top);
    } else if (x != x) {
      sum = x;  // NaN stays
    }
  }
  __device__ void join(float other_top, float other_sum) {
    const float peak = max(top, other_top);
    if (peak > -INFINITY) sum = sum * exp2_approx(top - peak) + other_sum * exp2_approx(other_top - peak);
    else sum += other_sum;
    top = peak;
  }
  // All lanes of the warp.
  __device__ void across_warp() {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
      const float other_top = __shfl_xor_sync(ALL_LANES, top, offset), other_sum = __shfl_xor_sync(ALL_LANES, sum, offset);
      join(other_top, other_sum);
    }
  }
  __device__ float value() const { return top + log2_approx(sum); }
};

constexpr float HIGHEST = 120;  // exponents of K beyond it can only lie between two sides without weight

// K at the present references, whose damping and scaled weights it fills in. No barrier after it.
template <class Cost> __device__ inline void build_kernel(const Problem& problem, const Cost& cost) {
  const float k = problem.scale;
  const auto weigh = [k](const Side& side, int i) {
    side.damping(i) = (side.tau - 1.0f) * k * side.reference(i);
    side.scaled(i) = side.weight(i) > 0 ? side.weight(i) * exp2_approx(side.log_scaling(i)) : 0.0f;
  };
  for (int i = threadIdx.x; i < problem.row_stride; i += blockDim.x) weigh(problem.rows, i);
  for (int j = threadIdx.x; j < problem.col_stride; j += blockDim.x) {
    weigh(problem.cols, j);
    const bool there = exists(problem.cols.weight(j));
    const float g = problem.cols.reference(j);
    const auto column = cost.column(problem.first + (there ? j : 0));
    for (int q = 0; q < problem.row_stride / QUAD; ++q) {
      float entry[QUAD];
#pragma unroll
      for (int r = 0; r < QUAD; ++r) {
        const int i = q * QUAD + r;
        const bool both = there && exists(problem.rows.weight(i));
        entry[r] = both ? exp2_approx(min(((problem.rows.reference(i) + g) - column.at(i)) * k, HIGHEST)) : 0.0f;
      }
      problem.K[Problem::quad(problem.row_stride / QUAD, q, j)] = make_float4(entry[0], entry[1], entry[2], entry[3]);
    }
  }
}

// Move the scalings into the references. With damping half way between the potential and the undamped one: the scalings and
// the sums then both carry half of a marginal that damping makes small.
__device__ inline void centre(const Side& side, int count, float scale, float inverse_scale) {
  const float share = (1.0f + side.tau) / (2.0f * side.tau);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const float potential = side.reference(i) + side.log_scaling(i) * inverse_scale, reference = potential * share;
    side.reference(i) = reference, side.log_scaling(i) = (potential - reference) * scale;
  }
}

// Before log-domain half iterations: potentials into next, logs of the weights into scaled.
__device__ inline void begin_logs(const Problem& problem) {
  const auto fill = [&problem](const Side& side, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      side.next(i) = side.reference(i) + side.log_scaling(i) * problem.inverse_scale;
      side.scaled(i) = side.weight(i) > 0 ? log2_approx(side.weight(i)) : -INFINITY;
    }
  };
  __syncthreads();
  fill(problem.rows, problem.row_stride), fill(problem.cols, problem.col_stride);
  __syncthreads();
}
// The potential that a log-sum gives, in place of the last one. Returns the change in units of 1 / k. With an exact mass the
// log-sum is only kept, in the place of the damping.
__device__ inline float take_potential(const Problem& problem, const Side& side, int i, float log_sum) {
  if (problem.mass > 0) {
    side.damping(i) = log_sum;
    return 0;
  }
  const float potential = -side.tau * log_sum * problem.inverse_scale;
  const float moved = fabsf(potential - side.next(i)) * problem.scale;
  side.next(i) = side.reference(i) = potential, side.log_scaling(i) = 0;
  return moved;
}

// f_i = -epsilon tau log sum_j b_j exp((g_j - C_ij) / epsilon). Returns this thread's largest change.
template <class Cost> __device__ inline float log_rows(const Problem& problem, const Cost& cost, Peers& peers) {
  const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  float* const slot = peers.slot();
  for (int i = threadIdx.x / WARP; i < problem.n; i += warps) {
    if (!exists(problem.rows.weight(i))) continue;
    LogSum sum;
    for (int j = lane; j < problem.m; j += WARP) {
      if (!exists(problem.cols.weight(j))) continue;
      const float entry = cost.column(problem.first + j).at(i);
      sum.add(fmaf(problem.cols.next(j) - entry, problem.scale, problem.cols.scaled(j)));
    }
    __syncwarp();
    sum.across_warp();
    if (lane == 0) slot[i] = sum.top, slot[problem.row_stride + i] = sum.sum;
  }
  peers.sync();
  float moved = 0;
  for (int i = threadIdx.x; i < problem.n; i += blockDim.x) {
    if (!exists(problem.rows.weight(i))) continue;
    LogSum sum;
    for (unsigned other = 0; other < peers.count; ++other) {
      const float* const theirs = peers.slot_of(other);
      sum.join(theirs[i], theirs[problem.row_stride + i]);
    }
    moved = max(moved, take_potential(problem, problem.rows, i, sum.value()));
  }
  peers.flip();
  __syncthreads();
  return moved;
}
// The same for the columns of this block.
template <class Cost> __device__ inline float log_columns(const Problem& problem, const Cost& cost) {
  float moved = 0;
  for (int j = threadIdx.x; j < problem.m; j += blockDim.x) {
    if (!exists(problem.cols.weight(j))) continue;
    const auto column = cost.column(problem.first + j);
    LogSum sum;
    for (int i = 0; i < problem.n; ++i) {
      if (!exists(problem.rows.weight(i))) continue;
      sum.add(fmaf(problem.rows.next(i) - column.at(i), problem.scale, problem.rows.scaled(i)));
    }
    moved = max(moved, take_potential(problem, problem.cols, j, sum.value()));
  }
  __syncthreads();
  return moved;
}

}  // namespace device
}  // namespace pk
