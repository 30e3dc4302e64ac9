// One dense problem on chip: its rows, the columns of this block, the kernel matrix.
//
//   plan_ij = a_i u_i K_ij v_j b_j,   K_ij = exp2(k (f_i + g_j - C_ij)),   u = exp2(lu), v = exp2(lv),   k = 1 / (epsilon ln 2),
//   potentials of the problem: f + lu / k and g + lv / k.
//
// f, g are references: where the scalings grow large the potentials are absorbed into them. Rows are kept in every block of
// the team and computed there redundantly; columns are divided between the blocks.
#pragma once
#include "peers.cuh"

namespace pk {

constexpr int QUAD = 4;        // rows of K that one 16-byte load brings
constexpr float ABSENT = -0.0f;  // weight of what is masked or padding: no weight, and it can be told from 0

__host__ __device__ inline int64_t round_to(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// How a batch of problems is laid out over blocks; made by placement.h.
struct Placement {
  int rows_template;      // ROWS of the kernel
  Meeting meeting;
  unsigned team, teams;   // blocks a problem, problems that run at the same time
  int threads;
  int row_stride, col_stride, cols_block;  // padded rows; padded and actual columns of a block
  bool global_state;      // K and the rest lie in the workspace
  size_t shared_bytes, state_bytes;  // state_bytes: of one block
};

namespace device {

__device__ inline bool exists(float weight) { return __float_as_int(weight) >= 0; }

// One side. What an update needs of an entry lies together: weight (ABSENT where there is no entry), damping
// (tau - 1) k reference, and the log scaling (base 2) beside the next one.
struct Side {
  static constexpr int FLOATS = 6;  // an entry
  float4* entries;
  int stride;
  bool turned;  // log_scaling and next have changed places
  float tau;
  __device__ float& weight(int i) const { return entries[i].x; }
  __device__ float& damping(int i) const { return entries[i].y; }
  __device__ float& log_scaling(int i) const { return turned ? entries[i].w : entries[i].z; }
  __device__ float& next(int i) const { return turned ? entries[i].z : entries[i].w; }
  __device__ float& reference(int i) const { return reinterpret_cast<float*>(entries + stride)[i]; }
  // Weight times scaling; in the log domain: log2 of the weight.
  __device__ float& scaled(int i) const { return reinterpret_cast<float*>(entries + stride)[stride + i]; }
};

// Hands out pieces of memory, or only counts if nobody uses them. Every piece is aligned to 16 bytes. The arithmetic is on
// pointers: through integers the compiler would lose that they point to shared memory.
struct Carver {
  unsigned char* base;
  size_t used = 0;
  __host__ __device__ float* floats(int64_t count) {
    float* const piece = reinterpret_cast<float*>(base + used);
    used += size_t(round_to(count * int64_t(sizeof(float)), 16));
    return piece;
  }
};

// Exchange buffer of a block: four floats a row, or two and the votes.
__host__ __device__ inline int slot_floats(int row_stride) { return 4 * row_stride + 2 * QUAD; }

struct Problem {
  Side rows, cols;
  float4* K;         // four rows of a column each, see `quad`; 0 where row or column is absent
  float* sum;        // [row_stride] K v b over all columns
  float* partial;    // [warps, row_stride] of the one-pass iteration
  float* scratch;    // [5, warps]: one float for reductions; largest change and trouble of rows and of columns
  int n, m, row_stride, col_stride;
  int first;         // global index of column 0 of this block
  float scale, inverse_scale;  // k and 1 / k
  float mass = 0;    // exact mass, if there is one: exact_mass.cuh

  // Place in K of rows 4 q .. 4 q + 3 of column j: tiles of 32 columns, so that the quads of a column are a constant apart and
  // neighbouring lanes read neighbouring memory.
  __device__ static int64_t quad(int quads, int q, int j) { return (int64_t(j / WARP) * quads + q) * WARP + j % WARP; }
  __device__ float potential(const Side& side, int i) const {
    return side.reference(i) + side.log_scaling(i) * inverse_scale;
  }
  __device__ float row_potential(int i) const { return potential(rows, i); }
  __device__ float col_potential(int j) const { return potential(cols, j); }
  __device__ float2* votes(bool of_columns) const {
    const int warps = blockDim.x / WARP;
    return reinterpret_cast<float2*>(scratch + round_to(warps, QUAD)) + (of_columns ? warps : 0);
  }

  // The memory of one problem; `fast` is always shared memory.
  __host__ __device__ void carve(Carver& fast, Carver& state, int row_stride_, int col_stride_, int threads, bool one_pass) {
    const int warps = threads / 32;
    row_stride = row_stride_, col_stride = col_stride_;
    scratch = fast.floats(round_to(warps, QUAD) + 4 * warps);
    partial = fast.floats(one_pass ? warps * row_stride : 0);
    rows.stride = row_stride, rows.entries = reinterpret_cast<float4*>(state.floats(Side::FLOATS * row_stride));
    cols.stride = col_stride, cols.entries = reinterpret_cast<float4*>(state.floats(Side::FLOATS * col_stride));
    sum = state.floats(row_stride);
    K = reinterpret_cast<float4*>(state.floats(int64_t(row_stride) * col_stride));
  }
};

}  // namespace device
}  // namespace pk
