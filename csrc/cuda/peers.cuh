// The blocks that work on one problem, and how they meet: one block alone, a thread block cluster, or blocks of a cooperative
// grid that exchange through global memory.
//
// Every block has two exchange buffers, used in turn: what was written before `sync` is read after it by all, and the next
// exchange needs no further barrier. Sums over the blocks are taken in the order of their ranks, so all get the same bits.
#pragma once
#include "numerics.cuh"

namespace pk {

enum class Meeting : int { block, cluster, grid };

namespace device {

struct Peers {
  Meeting meeting;
  unsigned rank, count;
  float* slots;        // the two buffers of this block; grid: those of rank 0 in global memory, the others follow
  int slot_floats, turn = 0;
  unsigned* counter;   // grid: arrivals of this team's blocks
  unsigned target = 0;

  __device__ float* slot_of(unsigned other) const {
    float* const own = slots + turn * slot_floats;
    if (meeting == Meeting::cluster) return cluster_map(own, other);
    return meeting == Meeting::grid ? own + int64_t(other) * 2 * slot_floats : own;
  }
  __device__ float* slot() const { return meeting == Meeting::grid ? slot_of(rank) : slots + turn * slot_floats; }
  __device__ void flip() { turn ^= 1; }

  // All threads of all blocks: what was written before is seen after.
  __device__ void sync() {
    if (meeting == Meeting::cluster) {
      cluster_sync();
      return;
    }
    __syncthreads();
    if (meeting == Meeting::block) return;
    target += count;
    if (threadIdx.x == 0) {
      add_release(counter, 1);
      // The difference is signed so that the counter may wrap around.
      while (int(load_acquire(counter) - target) < 0) relax();
    }
    __syncthreads();
  }

  // Sum or maximum over all threads of all blocks, the same bits everywhere. scratch: one float a warp.
  template <bool MAX> __device__ float reduce(float x, float* scratch) {
    x = block_reduce<float, MAX>(x, scratch);
    if (count == 1) return x;
    if (threadIdx.x == 0) slot()[0] = x;
    sync();
    float total = slot_of(0)[0];
    for (unsigned other = 1; other < count; ++other) {
      const float y = slot_of(other)[0];
      total = MAX ? (y > total ? y : total) : total + y;
    }
    flip();
    return total;
  }
  __device__ float sum(float x, float* scratch) { return reduce<false>(x, scratch); }
  __device__ float maximum(float x, float* scratch) { return reduce<true>(x, scratch); }
  __device__ bool all(bool x, float* scratch) { return maximum(x ? 0.0f : 1.0f, scratch) == 0.0f; }
};

}  // namespace device
}  // namespace pk
