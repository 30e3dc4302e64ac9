// Where a batch of dense problems goes: how many blocks a problem, how they meet, and where K lies. Pure functions of sizes
// and of the device's limits.
#pragma once
#include <algorithm>

#include "host.h"
#include "problem.cuh"

namespace pk {

// Kernels by their number of rows: up to 16, 32 or 40 in registers, any number (0), and any number with K in global memory.
constexpr int GLOBAL_ROWS = -1;
constexpr int ONE_PASS_THREADS = 256, TWO_PASS_THREADS = 512, GLOBAL_THREADS = 320;
struct Needs {  // of a kernel
  int rows_template;
  int two_pass_threads = TWO_PASS_THREADS;
  size_t extra_shared = 0;  // bytes beside a problem
};

inline int rows_template(int64_t rows) { return rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 40 ? 40 : 0; }

// Fill in the sizes that follow from the team and the template.
inline void measure(Placement& place, int64_t rows, int64_t cols, int two_pass_threads) {
  const bool one_pass = place.rows_template > 0;
  place.global_state = place.rows_template == GLOBAL_ROWS;
  place.row_stride = one_pass ? place.rows_template : int(round_to(rows, 2 * QUAD));
  place.cols_block = int((cols + place.team - 1) / place.team);
  place.col_stride = int(round_to(std::max(place.cols_block, 1), 32));
  place.threads = one_pass ? ONE_PASS_THREADS : place.global_state ? GLOBAL_THREADS : two_pass_threads;
  if (place.col_stride < place.threads) place.threads = std::max(64, place.col_stride);
  alignas(16) static unsigned char nowhere[16];  // only counted
  device::Carver fast{nowhere}, state{nowhere};
  device::Problem problem;
  problem.carve(fast, state, place.row_stride, place.col_stride, place.threads, one_pass);
  const size_t slots = 2 * sizeof(float) * size_t(device::slot_floats(place.row_stride));
  if (place.meeting != Meeting::grid) (place.global_state ? state : fast).used += slots;
  place.state_bytes = place.global_state ? size_t(round_to(int64_t(state.used), 256)) : 0;
  place.shared_bytes = fast.used + (place.global_state ? 0 : state.used);
}

inline Placement place(const Needs& needs, int64_t rows, int64_t cols, int64_t problems, const Limits& limits) {
  Placement best{};
  const auto attempt = [&](int rows_kernel, Meeting meeting, unsigned team) {
    Placement next{};
    next.rows_template = rows_kernel, next.meeting = meeting, next.team = team;
    measure(next, rows, cols, needs.two_pass_threads);
    next.shared_bytes += needs.extra_shared;
    next.teams = unsigned(std::min<int64_t>(problems, meeting == Meeting::grid ? limits.multiprocessors / team : 0x7fffffff / team));
    if (next.shared_bytes > size_t(limits.shared_block) || next.teams == 0) return false;
    best = next;
    return true;
  };
  // A problem by itself leaves most of the device idle: divide it while a block keeps enough columns.
  constexpr int64_t ENOUGH = 512;
  unsigned wanted = 1;
  while (wanted < 16 && problems * wanted * 2 <= limits.multiprocessors && cols >= int64_t(wanted) * 2 * ENOUGH) wanted *= 2;
  if (limits.compute_major >= 9) {
    const unsigned largest = limits.compute_major < 12 ? 16 : 8;  // data center chips take clusters of 16 on request
    for (unsigned team = wanted; team <= largest; team *= 2)
      if (attempt(needs.rows_template, team == 1 ? Meeting::block : Meeting::cluster, team)) return best;
  } else {
    if (wanted == 1 && attempt(needs.rows_template, Meeting::block, 1)) return best;
    // As many blocks as K needs; teams that run at the same time then share the device.
    for (unsigned team = std::max(wanted, 2u); team <= unsigned(limits.multiprocessors); ++team)
      if (int64_t(team) <= cols && attempt(needs.rows_template, Meeting::grid, team)) return best;
  }
  // K in global memory, which the L2 cache holds if it is small enough.
  const int64_t by_problems = std::max<int64_t>(1, limits.multiprocessors / std::max<int64_t>(problems, 1));
  const unsigned team = unsigned(std::clamp<int64_t>(cols / ENOUGH, 1, by_problems));
  if (attempt(GLOBAL_ROWS, team == 1 ? Meeting::block : Meeting::grid, team)) return best;
  best.team = 0;
  return best;
}

// Workspace: arrivals, exchange buffers of a grid, state.
struct Workspace {
  size_t counters, slots, state;  // bytes of each, one after the other
  __host__ __device__ explicit Workspace(const Placement& place) {
    const bool grid = place.meeting == Meeting::grid;
    const size_t blocks = size_t(place.team) * place.teams;
    counters = grid ? size_t(round_to(int64_t(place.teams) * 4, 256)) : 0;
    slots = grid ? size_t(round_to(int64_t(blocks) * 2 * device::slot_floats(place.row_stride) * 4, 256)) : 0;
    state = place.global_state ? blocks * place.state_bytes : 0;
  }
  size_t bytes() const { return counters + slots + state; }
};

inline Launch launch_of(const Placement& place, uintptr_t stream) {
  Launch where{dim3(place.team * place.teams), dim3(unsigned(place.threads)), place.shared_bytes, stream};
  where.cluster = place.meeting == Meeting::cluster ? place.team : 1;
  where.cooperative = place.meeting == Meeting::grid;
  return where;
}

namespace device {

// Set up a block's part of its team's problems; `fast` starts at the shared memory that is left for it. Call in all threads.
template <bool GLOBAL>
__device__ inline void settle(Problem& problem, Peers& peers, const Placement& place, Carver& fast, unsigned char* workspace,
                              int64_t rows, int64_t cols) {
  const unsigned team = blockIdx.x / place.team;
  peers.meeting = place.meeting, peers.count = place.team, peers.rank = blockIdx.x % place.team;
  peers.slot_floats = slot_floats(place.row_stride);
  const bool grid = place.meeting == Meeting::grid;
  const Workspace parts(place);
  const size_t team_slots = size_t(place.team) * 2 * peers.slot_floats;
  peers.counter = reinterpret_cast<unsigned*>(workspace) + team;
  Carver state{workspace + parts.counters + parts.slots + size_t(blockIdx.x) * place.state_bytes};
  Carver& rest = GLOBAL ? state : fast;
  problem.carve(fast, rest, place.row_stride, place.col_stride, place.threads, place.rows_template > 0);
  peers.slots = grid ? reinterpret_cast<float*>(workspace + parts.counters) + team * team_slots : rest.floats(2 * peers.slot_floats);
  problem.n = int(rows), problem.first = int(peers.rank) * place.cols_block;
  const int left = int(cols) - problem.first;
  problem.m = left < 0 ? 0 : left < place.cols_block ? left : place.cols_block;
}

}  // namespace device
}  // namespace pk
