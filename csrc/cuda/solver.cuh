// Solves one problem with a team of blocks: iterations without exponentials where a float holds K, new references when the
// scalings grow large, log-domain iterations where nothing else is right. Everything is decided on the device.
#pragma once
#include "exact_mass.cuh"
#include "log_domain.cuh"
#include "scaling.cuh"

namespace pk {

struct Inputs {  // of one problem; null where optional
  const float *a, *b;  // null: uniform over what exists
  const uint8_t *row_mask, *col_mask;
  const float *f_init, *g_init;
  float epsilon, tau_a, tau_b, tol;
  float mass;  // 0: not given; else tau is 1
  int max_iters;
};
struct Range {  // of a cost
  float low, high;
  bool finite;
};
struct Outcome {
  int iterations;
  float residual;  // NaN: the potentials are not finite
  bool empty;      // no weight on one side
};

namespace device {

template <int ROWS, class Cost> struct Solver {
  Problem problem;
  Peers peers;
  Cost cost;
  int iterations, failures, log_left;  // failures in a row; log-domain iterations before K is tried again
  bool scaled;                         // K and the row sums fit the potentials
  bool renew;                          // K is to be built at the references
  float residual, total_a, total_b;
  float level;                         // exact mass: the multiplier, in units of 1 / k

  // Load the weights and the start. All threads of all blocks of the team.
  __device__ void begin(const Inputs& in) {
    problem.scale = reciprocal_approx(in.epsilon * LN2), problem.inverse_scale = in.epsilon * LN2;
    problem.rows.tau = in.tau_a, problem.cols.tau = in.tau_b, problem.mass = in.mass;
    problem.rows.turned = problem.cols.turned = false;
    __syncthreads();  // the last problem's results have been read
    total_a = block_reduce<float, false>(load_side(problem.rows, in.a, in.row_mask, in.f_init, 0, problem.n, problem.row_stride),
                                         problem.scratch);
    total_b = peers.sum(load_side(problem.cols, in.b, in.col_mask, in.g_init, problem.first, problem.m, problem.col_stride),
                        problem.scratch);
    if (in.a == nullptr) total_a = weigh_evenly(problem.rows, problem.row_stride, total_a);
    if (in.b == nullptr) total_b = weigh_evenly(problem.cols, problem.col_stride, total_b);
    __syncthreads();
  }
  // Range of the cost, the same in all blocks.
  __device__ Range see_cost() {
    Range range{INFINITY, -INFINITY, true};
    range.finite = see_own_cost(range.low, range.high);
    range.finite = peers.all(range.finite, problem.scratch);
    range.low = -peers.maximum(-range.low, problem.scratch), range.high = peers.maximum(range.high, problem.scratch);
    return range;
  }

  // After `begin`. All threads of all blocks of the team. Afterwards problem.row_potential and col_potential are the solution.
  __device__ Outcome solve(const Inputs& in, Range range) {
    if (total_a <= 0 || total_b <= 0) return {0, 0.0f, true};
    const bool start = peers.all(finite_potentials(), problem.scratch);
    if (!(isfinite(total_a) && isfinite(total_b) && range.finite && start)) return {0, NAN, false};
    iterations = failures = log_left = 0, residual = INFINITY, scaled = false;
    renew = in.mass == 0 && in.f_init == nullptr && in.g_init == nullptr && (range.high - range.low) * problem.scale <= SCALING_HIGH;
    if (renew) start_close(range.low);
    level = 0;
    if (in.mass > 0 && in.f_init) level += start_caps(problem, peers, problem.rows, problem.n, false);
    if (in.mass > 0 && in.g_init) level += start_caps(problem, peers, problem.cols, problem.m, true);
    bool half = in.f_init != nullptr && in.g_init == nullptr;  // a start from f alone: half an iteration is not counted
    while (iterations < in.max_iters) {
      const bool counts = !renew && !half;
      iterations += counts;
      step(half);
      half = false;
      if (counts && residual < in.tol) break;
    }
    if (!peers.all(finite_potentials(), problem.scratch)) return {iterations, NAN, false};
    if (in.mass > 0) {
      split_level(problem, problem.rows, problem.n, level), split_level(problem, problem.cols, problem.m, level);
    } else if (in.tau_a == 1.0f && in.tau_b == 1.0f) {
      choose_constant();
    }
    __syncthreads();
    return {iterations, residual, false};
  }

  // ---- begin and end ---------------------------------------------------------------------------------------------------

  // Returns this thread's part of the weights; without weights, of the entries that exist.
  __device__ float load_side(Side& side, const float* weight, const uint8_t* mask, const float* init, int first, int size,
                             int stride) {
    float total = 0;
    for (int i = threadIdx.x; i < stride; i += blockDim.x) {
      const bool there = i < size && (mask == nullptr || mask[first + i]);
      const float w = there ? weight ? weight[first + i] : 1.0f : ABSENT;
      total += there ? w : 0.0f;
      side.weight(i) = w, side.reference(i) = there && init ? init[first + i] : 0.0f;
      side.log_scaling(i) = side.next(i) = side.damping(i) = side.scaled(i) = 0;
    }
    return total;
  }
  // Returns the total of the weights.
  __device__ float weigh_evenly(Side& side, int stride, float count) {
    for (int i = threadIdx.x; i < stride; i += blockDim.x)
      if (exists(side.weight(i))) side.weight(i) = 1.0f / count;
    return count > 0 ? 1.0f : 0.0f;
  }
  // Range of the entries that this thread reads. Returns whether they are finite.
  __device__ bool see_own_cost(float& low, float& high) {
    float zero = 0;
    for (int j = threadIdx.x; j < problem.m; j += blockDim.x) {
      if (!exists(problem.cols.weight(j))) continue;
      const auto column = cost.column(problem.first + j);
      for (int i = 0; i < problem.n; ++i) {
        if (!exists(problem.rows.weight(i))) continue;
        const float entry = column.at(i);
        low = min(low, entry), high = max(high, entry), zero += entry - entry;
      }
    }
    return zero == 0;
  }
  __device__ bool finite_potentials() {
    bool finite = true;
    for (int i = threadIdx.x; i < problem.n; i += blockDim.x) finite = finite && isfinite(problem.row_potential(i));
    for (int j = threadIdx.x; j < problem.m; j += blockDim.x) finite = finite && isfinite(problem.col_potential(j));
    return finite;
  }
  // f + c and g - c are the same plan: choose sum a f = sum b g, which treats rows and columns alike.
  __device__ void choose_constant() {
    float of_rows = 0, of_cols = 0;
    for (int i = threadIdx.x; i < problem.n; i += blockDim.x)
      if (problem.rows.weight(i) > 0) of_rows += problem.rows.weight(i) * problem.row_potential(i);
    for (int j = threadIdx.x; j < problem.m; j += blockDim.x)
      if (problem.cols.weight(j) > 0) of_cols += problem.cols.weight(j) * problem.col_potential(j);
    const float gap = block_reduce<float, false>(of_rows, problem.scratch) - peers.sum(of_cols, problem.scratch);
    const float shift = gap / (total_a + total_b);
    for (int i = threadIdx.x; i < problem.n; i += blockDim.x)
      if (exists(problem.rows.weight(i))) problem.rows.reference(i) -= shift;
    for (int j = threadIdx.x; j < problem.m; j += blockDim.x)
      if (exists(problem.cols.weight(j))) problem.cols.reference(j) += shift;
  }

  // ---- iterations ------------------------------------------------------------------------------------------------------

  // Close costs: K at f = low, g = 0 fits. The row potential stays 0: the first change is measured against it.
  __device__ void start_close(float low) {
    for (int i = threadIdx.x; i < problem.row_stride; i += blockDim.x)
      if (exists(problem.rows.weight(i)))
        problem.rows.reference(i) = low, problem.rows.log_scaling(i) = -low * problem.scale;
  }
  __device__ void absorb() {
    __syncthreads();
    centre(problem.rows, problem.row_stride, problem.scale, problem.inverse_scale);
    centre(problem.cols, problem.col_stride, problem.scale, problem.inverse_scale);
    renew = true;
  }

  // Build K, or one iteration: f, then g; only g if `half`. After steps that floats cannot represent, log-domain iterations
  // take over for a while: twice as many after each failure, up to 64. Each part is called in one place: it is inlined.
  __device__ void step(bool half) {
    const bool was_scaled = scaled, building = renew;
    const float level_before = level;
    float moved = 0, trouble = 0;
    if (building) {
      __syncthreads();
      build_kernel(problem, cost);
      __syncthreads();
      scaled = true;
    } else if (scaled) {
      const Votes votes = scale_rows(problem);
      scaled = votes.trouble < BAD;
      if (scaled) accept(problem.rows), moved = votes.moved, trouble = votes.trouble;
    }
    const bool logs = !scaled;
    if (logs) begin_logs(problem);
    if (logs && !half) {
      moved = block_reduce<float, true>(log_rows(problem, cost, peers), problem.scratch);
      if (problem.mass > 0) moved = set_caps(problem, peers, problem.rows, problem.n, false, level);
    }
    if (scaled) {
      const Votes votes = scale_columns<ROWS>(problem, !building, peers);
      if (building) {
        renew = false;
        return;
      }
      scaled = votes.trouble < BAD;
      if (scaled) accept(problem.cols), moved = max(moved, votes.moved), trouble = max(trouble, votes.trouble);
      else begin_logs(problem);
    }
    if (!scaled) {
      moved = max(moved, peers.maximum(log_columns(problem, cost), problem.scratch));
      if (problem.mass > 0) moved = max(moved, set_caps(problem, peers, problem.cols, problem.m, true, level));
    }
    residual = max(moved, fabsf(level - level_before)) * LN2;
    bool again = false;
    if (scaled) {
      failures = 0;
      // Slow convergence adds up the rounding of the scalings' logs: with new references they are small again.
      again = trouble == WIDE || (iterations >= 128 && (iterations & (iterations - 1)) == 0);
    } else if (was_scaled) {
      again = ++failures < 2;
      if (!again) log_left = 1 << (failures < 8 ? failures - 2 : 6);
    } else if (!half && problem.mass == 0) {
      again = --log_left <= 0;
    }
    if (again) absorb();
  }
};

// Entries of a cost in memory.
struct DenseCost {
  const void* entries;  // [n, m]
  Storage storage;
  int m;
  struct Column {
    const DenseCost& cost;
    int j;
    __device__ float at(int i) const {
      return load_stored(cost.entries, cost.storage, int64_t(i) * cost.m + j);
    }
  };
  __device__ Column column(int j) const { return {*this, j}; }
};

}  // namespace device
}  // namespace pk
