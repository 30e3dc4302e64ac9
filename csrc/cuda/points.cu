// Problems between point clouds whose cost is never stored: all iterations of all problems in one cooperative launch, between one
// that packs the points and one that writes the results.
//
// With points scaled as in points_tile.cuh, h_i = k |x_i|^2 (cosine: k / 2), k = 1 / (epsilon ln 2) and the offsets
// c_j = k g_j - h_j + log2 b_j, the log-sums l_i give f_i = -tau (l_i - h_i) / k. Blocks take tiles of rows and parts of the
// columns; the last one of a tile puts the parts together, in their order. Then the whole grid meets: twice an iteration. From the
// second iteration on the last log-sum of a row is its top; where that has moved too far, the half is repeated with the largest one.
#include <algorithm>

#include "host.h"
#include "points_tile.cuh"

namespace pk {
namespace {

using namespace device;

constexpr int BLOCKS_EACH = 2, MOST_SPLITS = 8;  // blocks on a multiprocessor; parts of the columns
constexpr int NOT_FINITE = 1, HAS_ROWS = 2, HAS_COLS = 4;  // flags of a problem
constexpr float FAR = 60;  // powers of two that a log-sum may move from its top

enum class Mode : int { solve, self, transform };

struct Cloud {  // one side of all problems; arrays [P, padded] unless said otherwise
  const float *points, *weight, *start;  // as given: [P, count, D], [P, count], [P, count] or null
  const uint8_t* mask;                   // [P, count] or null
  int64_t count, padded;
  int splits;                            // parts into which the other side is divided
  float tau;
  char* packed;                          // as Packed, problem by problem
  float *norm, *log_weight, *potential, *offset, *last;
  float2* parts;                         // [P, splits, padded] tops and sums
  unsigned* arrived;                     // [P, tiles] parts that are there, since the start
};

struct Work {
  Cloud sides[2];
  int *flags, *redo, *moved;  // [P], [P], [3, P]: bits of the largest change of an iteration
  unsigned* arrived;
  size_t cleared_bytes;       // of what has to be 0 at the start
  int64_t problems, dim;
  int chunks, max_iters;
  int slots;                  // of TileMemory
  Mode mode;
  float half_norm;            // cosine: of both sides in the place of |x|^2; squared distance: 0
  float slope, inverse_slope;  // s
  const double* epsilon;
  float tol;
  int32_t* n_iters;

  __device__ float scale(int64_t p) const { return reciprocal_approx(float(epsilon[p]) * LN2); }
  __device__ bool ready(int64_t p) const {
    if (mode == Mode::transform) return !(flags[p] & NOT_FINITE);
    return flags[p] == (mode == Mode::self ? HAS_ROWS : HAS_ROWS | HAS_COLS);
  }
  // Three in turn: one that is read, one that grows, one that is set back.
  __device__ int* moved_in(int iteration, int64_t p) const { return moved + (iteration + 3) % 3 * problems + p; }
  // A cloud against itself reads one copy and writes the other.
  __device__ float* offsets(const Cloud& side, int iteration) const {
    return side.offset + (mode == Mode::self && (iteration & 1) ? problems * side.padded : 0);
  }
  template <Precision P> __device__ Packed packed(const Cloud& side, int64_t p) const {
    const int64_t bytes = side.padded * chunks * chunk_bytes(P);
    return {side.packed + p * parts_of(P) * bytes, bytes, chunks};
  }
};

// ---- before and after ------------------------------------------------------------------------------------------------------------

// A warp a point: scaled, rounded, padded; its norm, its weight's log, its offset at the start.
template <Precision P>
__global__ void __launch_bounds__(TILE_THREADS) pack_kernel(const __grid_constant__ Work work, int side_index, bool given_logs) {
  constexpr int BYTES = element_bytes(P);
  const Cloud& side = work.sides[side_index];
  const int lane = threadIdx.x % WARP;
  constexpr unsigned POINTS = TILE_THREADS / WARP;
  const unsigned blocks = unsigned(side.padded) / POINTS;  // of a problem
  const int64_t p = blockIdx.x / blocks, i = blockIdx.x % blocks * POINTS + threadIdx.x / WARP, at = p * side.padded + i;
  const bool there = i < side.count && (side.mask == nullptr || side.mask[p * side.count + i]);
  const float k = work.scale(p), root = sqrt_approx(k * work.slope);
  const float* const point = side.points + (p * side.count + i) * work.dim;
  const Packed packed = work.packed<P>(side, p);
  char* const to = const_cast<char*>(packed.data) + i * work.chunks * chunk_bytes(P);
  float squared = 0, zero = 0;
#pragma unroll 1
  for (int64_t d = lane; d < int64_t(work.chunks) * (chunk_bytes(P) / BYTES); d += WARP) {
    float x = there && d < work.dim ? point[d] * root : 0.0f;
    zero += x - x;
    if constexpr (P == Precision::bf16) {
      const __nv_bfloat16 rounded = __float2bfloat16_rn(x);
      reinterpret_cast<__nv_bfloat16*>(to)[d] = rounded, x = to_float(rounded);
    } else {
      const uint32_t high = to_tf32(x);
      reinterpret_cast<uint32_t*>(to)[d] = high;
      if constexpr (parts_of(P) == 2) reinterpret_cast<uint32_t*>(to + packed.part_bytes)[d] = to_tf32(x - __uint_as_float(high));
      else x = __uint_as_float(high);
    }
    squared = fmaf(x, x, squared);  // of what is multiplied: the distances are those of the rounded points
  }
  squared = warp_sum(squared), zero = warp_sum(zero);
  if (lane != 0) return;
  const float norm = work.half_norm > 0 ? work.half_norm * k : squared * work.inverse_slope;
  float log_weight = -INFINITY, potential = 0;
  bool sound = true;
  if (there) {
    const float w = side.weight ? side.weight[p * side.count + i] : 1.0f;
    log_weight = given_logs ? w * LOG2_E : w > 0 ? log2_approx(w) : -INFINITY;
    potential = side.start ? side.start[p * side.count + i] : 0.0f;
    sound = zero == 0 && isfinite(potential) && log_weight < INFINITY && w == w && isfinite(4 * norm);
    if (log_weight > -INFINITY) atomicOr(work.flags + p, side_index == 0 ? HAS_ROWS : HAS_COLS);
  }
  if (!sound) atomicOr(work.flags + p, NOT_FINITE);
  side.norm[at] = norm, side.log_weight[at] = log_weight, side.potential[at] = potential, side.last[at] = 0;
  for (int copy = 0; copy < (work.mode == Mode::self ? 2 : 1); ++copy)
    work.offsets(side, copy)[at] = fmaf(potential, k, -norm) + log_weight;
}

struct Results {
  float* potentials[2];  // [P, count], the second may be null
  float* residual;       // [P] or null
  bool balanced;
};

// A block a problem.
__global__ void __launch_bounds__(TILE_THREADS) finish_kernel(const __grid_constant__ Work work, Results results) {
  PK_SHARED(float, scratch, TILE_THREADS / WARP);
  const int64_t p = blockIdx.x;
  const bool sound = work.ready(p), broken = work.flags[p] & NOT_FINITE;
  const int done = work.n_iters && sound ? work.n_iters[p] : 0;
  float residual = broken ? NAN : 0.0f;
  if (sound && done > 0) residual = __uint_as_float(unsigned(*work.moved_in(done - 1, p)));
  const auto sum_over = [&](const Cloud& side, bool of_weights) {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < side.count; i += TILE_THREADS) {
      const float log_weight = side.log_weight[p * side.padded + i];
      if (log_weight > -INFINITY) sum += exp2_approx(log_weight) * (of_weights ? 1.0f : side.potential[p * side.padded + i]);
    }
    return block_reduce<float, false>(sum, scratch);
  };
  float shift = 0;
  if (results.balanced && sound) {  // of all f + c, g - c the one with sum a f = sum b g, which treats rows and columns alike
    const float gap = sum_over(work.sides[0], false) - sum_over(work.sides[1], false);
    shift = gap / (sum_over(work.sides[0], true) + sum_over(work.sides[1], true));
  }
  const auto write = [&](const Cloud& side, float* to, float by) {
    for (int64_t i = threadIdx.x; i < side.count; i += TILE_THREADS) {
      const bool there = side.mask == nullptr || side.mask[p * side.count + i];
      const float value = sound && residual == residual ? side.potential[p * side.padded + i] + by : residual;
      to[p * side.count + i] = there ? value : 0.0f;
    }
  };
  write(work.sides[0], results.potentials[0], -shift);
  if (results.potentials[1]) write(work.sides[1], results.potentials[1], shift);
  if (threadIdx.x != 0) return;
  if (results.residual) results.residual[p] = residual;
  if (work.n_iters && !sound) work.n_iters[p] = 0;
}

// ---- iterations ------------------------------------------------------------------------------------------------------------------

// ONE: the features are one chunk.
template <Precision P, bool ONE> struct Iteration {
  const Work& work;
  TileMemory<P> memory;
  Peers peers{};
  int stamp = 0;

  // Whether a problem takes part in an iteration: not stopped in the one before.
  __device__ bool runs(int64_t p, int iteration) const {
    if (!work.ready(p)) return false;
    if (iteration <= 0) return true;
    const float moved = __uint_as_float(unsigned(*work.moved_in(iteration - 1, p)));
    return moved >= work.tol;  // not if it is NaN
  }

  // Parts of the log-sums of one tile of rows over one split of columns; the last part leads to the potentials.
  __device__ void work_on(int turn, int other_turn, int64_t item, bool safe, bool repeated, int iteration) const {
    const Cloud &own = work.sides[turn], &other = work.sides[other_turn];
    const int64_t tiles = own.padded / TILE_ROWS, p = item / (tiles * own.splits), tile = item / own.splits % tiles;
    const int64_t split = item % own.splits, col_tiles = (other.count + TILE_COLS - 1) / TILE_COLS;
    const int first = int(split * col_tiles / own.splits) * TILE_COLS, last = int((split + 1) * col_tiles / own.splits) * TILE_COLS;
    const Packed rows = work.packed<P>(own, p), cols = work.packed<P>(other, p);
    const float* const offsets = work.offsets(other, iteration) + p * other.padded;
    const int64_t row = tile * TILE_ROWS;
    float tops[2 * M_TILES], sums[2 * M_TILES];
#pragma unroll
    for (int r = 0; r < 2 * M_TILES; ++r) tops[r] = own.last[p * own.padded + row + row_of(r)];
    log_sums<P, ONE>(memory, rows, cols, offsets, row, first, last, safe, tops, sums);
    if (threadIdx.x % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2 * M_TILES; ++r)
        own.parts[(p * own.splits + split) * own.padded + row + row_of(r)] = make_float2(tops[r], sums[r]);
    }
    PK_SHARED(unsigned, before, 1);
    __syncthreads();
    if (threadIdx.x == 0) before[0] = arrive(own.arrived + p * tiles + tile);
    __syncthreads();
    const bool complete = before[0] % unsigned(own.splits) == unsigned(own.splits) - 1;
    const int64_t i = row + threadIdx.x;
    if (complete && i < own.count) update(own, p, i, safe, repeated, iteration);
  }

  // Potential and offset of row i of problem p from its parts. A sum far from its top asks for a repetition, in which rows that
  // have their potential keep it: NaN as top marks those that wait.
  __device__ void update(const Cloud& own, int64_t p, int64_t i, bool safe, bool repeated, int iteration) const {
    const int64_t at = p * own.padded + i;
    if ((own.mask && !own.mask[p * own.count + i]) || (repeated && own.last[at] == own.last[at])) return;
    LogSum total;
    float sum = 0, top = 0;
    for (int split = 0; split < own.splits; ++split) {
      const float2 part = own.parts[(p * own.splits + split) * own.padded + i];
      if (safe) total.join(part.x, part.y);
      else top = part.x, sum += part.y;
    }
    const float away = safe ? 0.0f : log2_approx(sum), log_sum = safe ? total.value() : top + away;
    if (!safe && !(fabsf(away) <= FAR)) {
      atomicMax(work.redo + p, stamp);
      own.last[at] = NAN;
      return;
    }
    const float k = work.scale(p), before = own.potential[at], image = -own.tau * (log_sum - own.norm[at]) / k;
    const float potential = work.mode == Mode::self ? (before + image) / 2 : image;
    const float change = fabsf(image - before) * k * LN2;
    atomicMax(work.moved_in(iteration, p), __float_as_int(change));  // NaN is more than everything
    own.potential[at] = potential, own.last[at] = log_sum;
    work.offsets(own, iteration + 1)[at] = fmaf(potential, k, -own.norm[at]) + own.log_weight[at];
  }

  // One side from the other. The whole grid.
  __device__ void half(int turn, int other_turn, int iteration, bool safe) {
    const Cloud& own = work.sides[turn];
    for (int attempt = 0; attempt < 2; ++attempt) {
      const int repeated = stamp++;
      const auto takes_part = [&](int64_t p) { return runs(p, iteration) && (attempt == 0 || work.redo[p] == repeated); };
      const int64_t tiles = own.padded / TILE_ROWS * own.splits;
      for (int64_t item = blockIdx.x; item < work.problems * tiles; item += gridDim.x)
        if (takes_part(item / tiles)) work_on(turn, other_turn, item, safe || attempt > 0, attempt > 0, iteration);
      peers.sync();
      if (safe || attempt > 0 || !any([&](int64_t p) { return work.redo[p] == stamp; })) return;
    }
  }
  template <class Test> __device__ bool any(Test&& test) const {
    PK_SHARED(float, scratch, TILE_THREADS / WARP);
    float found = 0;
    for (int64_t p = threadIdx.x; p < work.problems; p += TILE_THREADS)
      if (test(p)) found = 1;
    return block_reduce<float, true>(found, scratch) > 0;
  }

  // Before an iteration. False if no problem takes part.
  __device__ bool prepare(int iteration) const {
    if (!any([&](int64_t p) { return runs(p, iteration); })) return false;
    for (int64_t p = threadIdx.x; p < work.problems && blockIdx.x == 0; p += TILE_THREADS) {
      if (runs(p, iteration)) {
        *work.moved_in(iteration + 1, p) = 0;
        if (work.n_iters) work.n_iters[p] = iteration + 1;
      } else {
        *work.moved_in(iteration, p) = *work.moved_in(iteration - 1, p);
      }
    }
    return true;
  }
  __device__ void run(bool begin_with_cols) {
    const int turns = work.mode == Mode::solve ? 2 : 1;
    int turn = begin_with_cols ? 1 : 0, iteration = begin_with_cols ? -1 : 0;  // `half` is inlined: it is called in one place
    while (iteration < work.max_iters) {
      if (turn == 0 && !prepare(iteration)) return;
      const bool first = iteration < 0 || (iteration == 0 && !(begin_with_cols && turn == 1));
      half(turn, work.mode == Mode::self ? 0 : 1 - turn, iteration, first);
      if (++turn >= turns) turn = 0, ++iteration;
    }
  }
};

template <Precision P, bool ONE>
__global__ void __launch_bounds__(TILE_THREADS, BLOCKS_EACH) points_kernel(const __grid_constant__ Work work, bool begin_with_cols) {
  PK_DYNAMIC_SHARED(shared);
  Iteration<P, ONE> iteration{work, {reinterpret_cast<char*>(shared), work.slots}};
  iteration.peers.meeting = gridDim.x > 1 ? Meeting::grid : Meeting::block;
  iteration.peers.rank = blockIdx.x, iteration.peers.count = gridDim.x, iteration.peers.counter = work.arrived;
  iteration.run(begin_with_cols);
}

// ---- launchers -------------------------------------------------------------------------------------------------------------------

struct Plan {
  Work work;
  unsigned blocks;
  size_t shared_bytes, workspace_bytes;
};

Cloud side_of(const PointsTask<float>& task, bool rows, Mode mode) {
  Cloud side{};
  side.points = rows ? task.x : task.y, side.count = rows ? task.rows : task.cols, side.padded = padded_count(side.count);
  side.weight = rows ? mode == Mode::transform ? nullptr : task.a : task.b, side.start = rows ? task.f_init : task.g_init;
  side.mask = rows ? task.row_mask : task.col_mask, side.tau = float(rows ? task.tau_a : task.tau_b);
  return side;
}

// Sizes and the workspace's division; base may be null where only sizes are asked for.
template <Precision P>
const char* plan(const PointsTask<float>& task, Mode mode, const Limits& limits, unsigned char* base, Plan& plan) {
  alignas(16) static unsigned char nowhere[16];  // only counted
  const int sides = mode == Mode::self ? 1 : 2;
  Work& work = plan.work = {};
  work.problems = task.problems, work.dim = task.dim, work.mode = mode;
  work.max_iters = mode == Mode::transform ? 1 : task.max_iters;
  work.chunks = int(chunks_of(task.dim, P)), work.tol = float(task.tol), work.n_iters = task.n_iters;
  work.half_norm = task.squared ? 0.0f : 0.5f, work.slope = task.squared ? 2.0f : 1.0f, work.inverse_slope = 1 / work.slope, work.epsilon = task.epsilon;
  // Two blocks on a multiprocessor if they fit, each with 1 KiB for the system and static arrays; all chunks of the rows if they
  // fit, too.
  constexpr size_t SYSTEM = 1024, STATIC = 1024;
  const size_t whole = size_t(limits.shared_block) - STATIC, half = (whole + STATIC + SYSTEM) / BLOCKS_EACH - SYSTEM - STATIC;
  const int least = std::min(work.chunks, 2);
  const size_t available = TileMemory<P>::bytes(least) <= half ? half : whole;
  if (TileMemory<P>::bytes(least) > available) return "too little shared memory on this device; use backend='reference'";
  work.slots = TileMemory<P>::bytes(work.chunks) <= available ? work.chunks : least;
  plan.shared_bytes = TileMemory<P>::bytes(work.slots);
  const int64_t wanted = int64_t(limits.multiprocessors) * (available == half ? BLOCKS_EACH : 1);
  Carver memory{base ? base : nowhere};
  const auto ints = [&memory](int64_t count) { return reinterpret_cast<int*>(memory.floats(count)); };
  work.flags = ints(task.problems), work.redo = ints(task.problems), work.moved = ints(3 * task.problems);
  work.arrived = reinterpret_cast<unsigned*>(ints(1));
  for (int turn = 0; turn < sides; ++turn) {
    Cloud& side = work.sides[turn] = side_of(task, turn == 0, mode);
    side.arrived = reinterpret_cast<unsigned*>(memory.floats(task.problems * side.padded / TILE_ROWS));
  }
  work.cleared_bytes = memory.used;
  int64_t items = 1;
  for (int turn = 0; turn < sides; ++turn) {
    Cloud& side = work.sides[turn];
    const int64_t other = turn == 0 && sides == 2 ? task.cols : task.rows, tiles = task.problems * side.padded / TILE_ROWS;
    const int64_t most = std::min<int64_t>(MOST_SPLITS, (other + 2 * TILE_COLS - 1) / (2 * TILE_COLS));
    side.splits = int(std::clamp<int64_t>(wanted / std::max<int64_t>(tiles, 1), 1, std::max<int64_t>(most, 1)));
    items = std::max(items, tiles * side.splits);
    if (tiles > 0x7fffffff / 64) return "too many points; use smaller batches";
    if (side.padded > 0x7fffffff / 2) return "more than 2^30 points in a cloud";
    const int64_t all = task.problems * side.padded;
    memory.used = size_t(round_to(int64_t(memory.used), 128));
    side.packed = reinterpret_cast<char*>(memory.floats(all * parts_of(P) * work.chunks * chunk_bytes(P) / 4));
    for (float** array : {&side.norm, &side.log_weight, &side.potential, &side.last}) *array = memory.floats(all);
    side.offset = memory.floats(mode == Mode::self ? 2 * all : all);
    side.parts = reinterpret_cast<float2*>(memory.floats(2 * all * side.splits));
  }
  plan.workspace_bytes = memory.used, plan.blocks = unsigned(std::min(items, wanted));
  return nullptr;
}

template <Precision P> cudaError_t launch_all(const PointsTask<float>& task, const Plan& plan, const CudaCall& call) {
  const Work& work = plan.work;
  cudaError_t error = clear(call.workspace, work.cleared_bytes, call.stream);
  for (int turn = 0; turn < (work.mode == Mode::self ? 1 : 2); ++turn) {
    const unsigned blocks = unsigned(task.problems * work.sides[turn].padded / (TILE_THREADS / WARP));
    const Launch pack{dim3(blocks), dim3(TILE_THREADS), 0, call.stream};
    if (error == cudaSuccess) error = launch(pack_kernel<P>, pack, work, turn, work.mode == Mode::transform && turn == 1);
  }
  Launch all{dim3(plan.blocks), dim3(TILE_THREADS), plan.shared_bytes, call.stream};
  all.cooperative = plan.blocks > 1;
  const bool begin_with_cols = work.mode == Mode::solve && task.f_init && !task.g_init;
  const auto kernel = P == Precision::bf16 && work.chunks == 1 ? points_kernel<P, P == Precision::bf16> : points_kernel<P, false>;
  if (error == cudaSuccess) error = launch(kernel, all, work, begin_with_cols);
  const bool balanced = work.mode == Mode::solve && task.tau_a == 1.0 && task.tau_b == 1.0;
  const Results results{{task.f, work.mode == Mode::solve ? task.g : nullptr}, task.residual, balanced};
  const Launch finish{dim3(unsigned(task.problems)), dim3(TILE_THREADS), 0, call.stream};
  if (error == cudaSuccess) error = launch(finish_kernel, finish, work, results);
  return error;
}

template <Precision P> const char* run_in(const PointsTask<float>& task, Mode mode, const CudaCall& call) {
  const char* reason = nullptr;
  const char* message = on_device(call.device, [&] {
    Limits limits;
    Plan found;
    const cudaError_t error = limits_of(call.device, limits);
    if (error == cudaSuccess) reason = plan<P>(task, mode, limits, static_cast<unsigned char*>(call.workspace), found);
    return error != cudaSuccess || reason != nullptr ? error : launch_all<P>(task, found, call);
  });
  return reason ? reason : message;
}
const char* run(const PointsTask<float>& task, Mode mode, const CudaCall& call) {
  if (task.problems * task.rows * (mode == Mode::self ? 1 : task.cols) == 0) return nullptr;
  if (task.mass != nullptr) return "an exact mass is not there on CUDA; use backend='reference'";
  if (task.anderson) return "Anderson acceleration is not there on CUDA; use acceleration=None or backend='reference'";
  if (task.precision == Precision::float32) return run_in<Precision::float32>(task, mode, call);
  return task.precision == Precision::tf32 ? run_in<Precision::tf32>(task, mode, call) : run_in<Precision::bf16>(task, mode, call);
}

}  // namespace

size_t cuda_points_workspace(const PointsTask<float>& task, const CudaCall& call) {
  Limits limits;
  Plan found;
  if (limits_of(call.device, limits) != cudaSuccess) return 0;
  const Mode mode = task.y == nullptr ? Mode::self : task.g == nullptr ? Mode::transform : Mode::solve;
  const auto size = task.precision == Precision::float32 ? plan<Precision::float32>
                    : task.precision == Precision::tf32  ? plan<Precision::tf32>
                                                         : plan<Precision::bf16>;
  return size(task, mode, limits, nullptr, found) == nullptr ? found.workspace_bytes : 0;
}
const char* cuda_points_solve(const PointsTask<float>& task, const CudaCall& call) { return run(task, Mode::solve, call); }
const char* cuda_points_self(const PointsTask<float>& task, const CudaCall& call) { return run(task, Mode::self, call); }
const char* cuda_points_transform(const PointsTask<float>& task, const CudaCall& call) { return run(task, Mode::transform, call); }

}  // namespace pk
