// Log-sums over the kernel of two point clouds, tile by tile on tensor cores: the cost is computed, used and forgotten.
//
//   log2 sum_j exp2(<x_i, y_j> + c_j),   points scaled by the root of s / (epsilon ln 2), so that the product is in powers of two.
//
// A block has 128 rows and goes over tiles of 64 columns. Features come in chunks. With float32 every number is the sum of two of
// TF32, and the three larger ones of the four products are taken, which leaves the rounding of float32.
#pragma once
#include "log_domain.cuh"

namespace pk {

namespace device {

constexpr int TILE_ROWS = 128, TILE_COLS = 64, TILE_THREADS = 128;
constexpr int M_TILES = 2, N_TILES = 8;                     // of 16 rows and of 8 columns: what a warp multiplies

__host__ __device__ constexpr int parts_of(Precision precision) { return precision == Precision::float32 ? 2 : 1; }
__host__ __device__ constexpr int element_bytes(Precision precision) { return precision == Precision::bf16 ? 2 : 4; }
// Bytes of a chunk; in shared memory its rows are so much longer that those of a matrix spread over the banks.
__host__ __device__ constexpr int chunk_bytes(Precision precision) { return precision == Precision::float32 ? 64 : 128; }
__host__ __device__ constexpr int pitch_of(Precision precision) { return chunk_bytes(precision) + 16; }
__host__ __device__ constexpr int64_t padded_count(int64_t count) { return (count + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS; }
__host__ __device__ constexpr int64_t chunks_of(int64_t dim, Precision precision) {
  return (dim * element_bytes(precision) + chunk_bytes(precision) - 1) / chunk_bytes(precision);
}

// Points of one problem as `pack` leaves them: [parts, padded count, chunks, chunk_bytes]; zeros beyond the cloud.
struct Packed {
  const char* data;
  int64_t part_bytes;
  int chunks;
};

// Shared memory of a block: the rows, all chunks of them if `resident`, else two stages; two stages of columns and their offsets.
template <Precision P> struct TileMemory {
  static constexpr int SLOT = parts_of(P) * TILE_ROWS * pitch_of(P), STAGE = parts_of(P) * TILE_COLS * pitch_of(P);
  char* rows;
  int slots;  // chunks of rows that are there
  static size_t bytes(int slots) { return size_t(slots) * SLOT + 2 * STAGE + 2 * TILE_COLS * sizeof(float); }
  // Offsets from one base, not an array of pointers, which would lie in local memory.
  __device__ char* row_slot(int slot) const { return rows + slot * SLOT; }
  __device__ char* col_stage(int stage) const { return rows + slots * SLOT + stage * STAGE; }
  __device__ float* offsets(int stage) const { return reinterpret_cast<float*>(col_stage(2)) + stage * TILE_COLS; }
};

template <Precision P> struct Tile {
  static constexpr int PARTS = parts_of(P), CHUNK = chunk_bytes(P), PITCH = pitch_of(P);
  float sums[M_TILES][N_TILES][4];
  // Number r of this thread's rows; column h of its two of tile n.
  __device__ float& at(int r, int n, int h) { return sums[r / 2][n][r % 2 * 2 + h]; }

  // Neighbouring threads take 16 bytes each of a row.
  template <int COUNT> __device__ static void fetch(char* to, const Packed& cloud, int64_t first, int chunk) {
    constexpr int LANES = CHUNK / 16, STEP = TILE_THREADS / LANES;
    const int row = threadIdx.x / LANES, at = threadIdx.x % LANES * 16;
    const int pitch = cloud.chunks * CHUNK;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const char* from = cloud.data + part * cloud.part_bytes + (first + row) * pitch + chunk * CHUNK + at;
      char* const target = to + (part * COUNT + row) * PITCH + at;
#pragma unroll
      for (int i = 0; i < COUNT; i += STEP, from += STEP * pitch) copy_async<16>(target + i * PITCH, from);
    }
  }
  // Entry 2 k + h of a fragment: row lane / 4 + 8 k, column 2 (lane % 4) + h of its 16 x 8 numbers. They start as c_j - top_i.
  __device__ void begin(const float* offsets, const float (&tops)[2 * M_TILES]) {
    const int pair = threadIdx.x % WARP % 4 * 2;
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
      const float2 c = *reinterpret_cast<const float2*>(offsets + n * 8 + pair);
#pragma unroll
      for (int r = 0; r < 2 * M_TILES; ++r)
        at(r, n, 0) = c.x - tops[r], at(r, n, 1) = c.y - tops[r];
    }
  }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (P == Precision::bf16) mma_bf16(d, a, b);
    else mma_tf32(d, a, b);
  }
  // One chunk: steps of 32 bytes, which are 8 numbers of TF32 or 16 of bf16.
  __device__ void add(const char* rows, const char* cols) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, line = lane % 8, matrix = lane / 8;
    const char* const row = rows + (warp * 16 * M_TILES + matrix % 2 * 8 + line) * PITCH + matrix / 2 * 16;
    const char* const col = cols + (matrix / 2 * 8 + line) * PITCH + matrix % 2 * 16;
#pragma unroll(PARTS == 2 ? 1 : 4)
    for (int step = 0; step < CHUNK; step += 32) {
      uint32_t a[PARTS][M_TILES][4];
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) load_matrices(a[part][m], row + (part * TILE_ROWS + m * 16) * PITCH + step);
#pragma unroll
      for (int n = 0; n < N_TILES; n += 2) {
        uint32_t b[PARTS][2][2];
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          uint32_t four[4];
          load_matrices(four, col + (part * TILE_COLS + n * 8) * PITCH + step);
          b[part][0][0] = four[0], b[part][0][1] = four[1], b[part][1][0] = four[2], b[part][1][1] = four[3];
        }
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int m = 0; m < M_TILES; ++m) {
            if constexpr (PARTS == 2) {
              multiply(sums[m][n + k], a[1][m], b[0][k]), multiply(sums[m][n + k], a[0][m], b[1][k]);
            }
            multiply(sums[m][n + k], a[0][m], b[0][k]);
          }
      }
    }
  }
};

// Visits all tiles of columns [first, last), multiples of TILE_COLS, against the rows from row_first on: use(tile), whose
// numbers are exponents relative to `tops`. The next stage is fetched while one is used. ONE: there is one chunk. All threads of
// the block.
template <Precision P, bool ONE, class Use>
__device__ inline void each_tile(const TileMemory<P>& memory, const Packed& rows, const Packed& cols, const float* offsets,
                                 int64_t row_first, int first, int last, const float (&tops)[2 * M_TILES], Use&& use) {
  const int chunks = ONE ? 1 : rows.chunks;
  const bool resident = ONE || memory.slots == chunks;
  __syncthreads();  // the last item's tiles have been read
  if (first == last) return;
  const auto fetch = [&](int col, int chunk, int stage) {
    Tile<P>::template fetch<TILE_COLS>(memory.col_stage(stage), cols, col, chunk);
    if (!resident) Tile<P>::template fetch<TILE_ROWS>(memory.row_slot(stage), rows, row_first, chunk);
    // A column's offsets are in place before its first chunk is used, and not overwritten before they have been read.
    if (chunk == 0 && threadIdx.x < TILE_COLS) memory.offsets(col / TILE_COLS & 1)[threadIdx.x] = offsets[col + threadIdx.x];
    copy_async_commit();
  };
  if (resident)
    for (int chunk = 0; chunk < chunks; ++chunk) Tile<P>::template fetch<TILE_ROWS>(memory.row_slot(chunk), rows, row_first, chunk);
  fetch(first, 0, 0);
  Tile<P> tile;
  int stage = 0;
  for (int col = first; col < last; col += TILE_COLS) {
    for (int chunk = 0; chunk < chunks; ++chunk, stage ^= 1) {
      copy_async_wait<0>();
      __syncthreads();  // this stage is there for all, and all are done with the one before
      const bool next_tile = chunk == chunks - 1;
      if (!next_tile || col + TILE_COLS < last) fetch(next_tile ? col + TILE_COLS : col, next_tile ? 0 : chunk + 1, stage ^ 1);
      if (chunk == 0) tile.begin(memory.offsets(col / TILE_COLS & 1), tops);
      tile.add(memory.row_slot(resident ? chunk : stage), memory.col_stage(stage));
    }
    use(tile);
  }
}

// Row of this thread: number r of its four.
__device__ inline int row_of(int r) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  return warp * 16 * M_TILES + r / 2 * 16 + r % 2 * 8 + lane / 4;
}

// Log-sums of the rows from row_first on over columns [first, last), as a top and a sum that is relative to it. safe: the top is the
// largest exponent; else it is given in `tops`, and one exponential is all that an entry needs.
template <Precision P, bool ONE>
__device__ inline void log_sums(const TileMemory<P>& memory, const Packed& rows, const Packed& cols, const float* offsets,
                                int64_t row_first, int first, int last, bool safe, float (&tops)[2 * M_TILES],
                                float (&sums)[2 * M_TILES]) {
  float given[2 * M_TILES];  // what the exponents are relative to
#pragma unroll
  for (int r = 0; r < 2 * M_TILES; ++r) {
    sums[r] = 0, given[r] = safe ? 0.0f : tops[r];
    if (safe) tops[r] = -INFINITY;
  }
  each_tile<P, ONE>(memory, rows, cols, offsets, row_first, first, last, given, [&](Tile<P>& tile) {
    if (safe) {
#pragma unroll
      for (int r = 0; r < 2 * M_TILES; ++r) {
        float top = tops[r];
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) top = max(top, max(tile.at(r, n, 0), tile.at(r, n, 1)));
        if (top > tops[r]) sums[r] *= exp2_approx(tops[r] - top), tops[r] = top;
        const float level = top == -INFINITY ? 0.0f : top;  // -inf - -inf is NaN
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) tile.at(r, n, 0) -= level, tile.at(r, n, 1) -= level;
      }
    }
#pragma unroll
    for (int r = 0; r < 2 * M_TILES; ++r) {
      float even = 0, odd = 0;
#pragma unroll
      for (int n = 0; n < N_TILES; ++n) even += exp2_approx(tile.at(r, n, 0)), odd += exp2_approx(tile.at(r, n, 1));
      sums[r] += even + odd;
    }
  });
#pragma unroll
  for (int r = 0; r < 2 * M_TILES; ++r) {  // four lanes share a row
    LogSum sum{tops[r], sums[r]};
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      const float other_top = __shfl_xor_sync(ALL_LANES, sum.top, offset), other = __shfl_xor_sync(ALL_LANES, sum.sum, offset);
      if (safe) sum.join(other_top, other);
      else sum.sum += other;
    }
    tops[r] = sum.top, sums[r] = sum.sum;
  }
}

}  // namespace device
}  // namespace pk
