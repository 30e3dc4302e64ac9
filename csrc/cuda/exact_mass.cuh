// Problems with an exact transported mass: potentials are caps <= 0, and one level carries the multiplier of the mass. Half
// iterations are log-sums: caps and level follow from those of a side.
//
//   sum_i weight_i min(1, exp2(level + log_sum_i)) = mass,   cap_i = -max(level + log_sum_i, 0) / k
#pragma once
#include "problem.cuh"

namespace pk {
namespace device {

constexpr float MASS_SLACK = 1e-6f;  // an entry counts as full from here on: rounding must not open the next one instead
constexpr int MASS_STEPS = 60;

// Reductions over a side: rows are in every block, columns are divided between the blocks.
struct Entire {
  const Problem& problem;
  Peers& peers;
  bool of_cols;
  __device__ float sum(float x) const {
    return of_cols ? peers.sum(x, problem.scratch) : block_reduce<float, false>(x, problem.scratch);
  }
  __device__ float maximum(float x) const {
    return of_cols ? peers.maximum(x, problem.scratch) : block_reduce<float, true>(x, problem.scratch);
  }
};

// log2 sum_i weight_i exp2(log_sum_i) over the entries with log_sum <= limit, and the weight of the others.
__device__ inline float2 split_at(const Entire& all, const Side& side, int count, float limit) {
  float top = -INFINITY, open = 0, full = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x)
    if (side.weight(i) > 0 && side.damping(i) <= limit) top = max(top, side.damping(i));
  top = all.maximum(top);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    if (!(side.weight(i) > 0)) continue;
    if (side.damping(i) <= limit) open = fmaf(side.weight(i), exp2_approx(side.damping(i) - top), open);
    else full += side.weight(i);
  }
  open = all.sum(open), full = all.sum(full);
  return make_float2(top + log2_approx(open), full);
}

// Level of a side in powers of two. Newton's method on a concave piecewise linear function of exp2(level): every step ends left
// of the solution.
__device__ inline float find_level(const Entire& all, const Side& side, int count, float mass, float start) {
  float x = start;
  for (int attempt = 0; attempt < MASS_STEPS; ++attempt) {
    const float2 now = split_at(all, side, count, MASS_SLACK - x);
    const float room = mass - now.y;
    float next = log2_approx(room) - now.x;
    if (!(room > 0) || !isfinite(next)) {  // too far right, or all are full, to rounding
      if (attempt > 0) break;
      next = log2_approx(mass) - split_at(all, side, count, INFINITY).x;
    }
    const float step = fabsf(next - x);
    x = next;
    if (!(step > 1e-6f + 2e-7f * fabsf(x))) break;
  }
  return x;
}

// Caps of a side from its log-sums, into the references and next; `level` moves. Returns the largest change of a cap, in
// units of 1 / k. No barrier after it.
__device__ inline float set_caps(const Problem& problem, Peers& peers, const Side& side, int count, bool of_cols, float& level) {
  __syncthreads();
  const Entire all{problem, peers, of_cols};
  const float x = find_level(all, side, count, problem.mass, level);
  float moved = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    if (!exists(side.weight(i))) continue;
    const float cap = -max(side.damping(i) + x, 0.0f) * problem.inverse_scale;
    moved = max(moved, fabsf(cap - side.next(i)) * problem.scale);
    side.next(i) = side.reference(i) = cap, side.log_scaling(i) = 0;
  }
  level = x;
  return all.maximum(moved);
}

// Given potentials as caps; their largest one goes to the level.
__device__ inline float start_caps(const Problem& problem, Peers& peers, const Side& side, int count, bool of_cols) {
  float top = -INFINITY;
  for (int i = threadIdx.x; i < count; i += blockDim.x)
    if (exists(side.weight(i))) top = max(top, side.reference(i));
  top = Entire{problem, peers, of_cols}.maximum(top);
  for (int i = threadIdx.x; i < count; i += blockDim.x)
    if (exists(side.weight(i))) side.reference(i) -= top;
  return top * problem.scale;
}

// Potentials from caps: either side takes half of the level.
__device__ inline void split_level(const Problem& problem, const Side& side, int count, float level) {
  for (int i = threadIdx.x; i < count; i += blockDim.x)
    if (exists(side.weight(i))) side.reference(i) += level * problem.inverse_scale / 2;
}

}  // namespace device
}  // namespace pk
