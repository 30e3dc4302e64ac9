// The token cost of all heads of one sample.
#pragma once
#include "token_sample.h"

namespace {

// Geometry and semantic term, in the memory of the sample; packed: room for the text features.
template <class T> void read_sample(const CostTask<T>& task, int64_t b, Sample<T>& s, T* packed, Team* team) {
  s.n = gather(task.row_mask ? task.row_mask + b * task.rows : nullptr, task.rows, s.rows);
  if (s.n == 0) return;
  s.read_geometry(task, b);
  const CosineShape<T> shape{s.n, task.dim};
  pack_text(shape, task.text + b * task.rows * task.dim, s.rows, packed);
  const T* video = task.video + b * task.cols * task.dim;
  for_chunks(team, (task.cols + VIDEO_BLOCK - 1) / VIDEO_BLOCK,
             [&](int64_t block) { cosine_block(shape, packed, video, task.cols, block, s.semantic); });
}

// Rows in at most so many pieces, each long enough to be handed to another thread.
struct RowChunks {
  int64_t rows, step;
  RowChunks(int64_t n, int64_t entries_per_row, int64_t most) : rows(n) {
    const int64_t enough = (int64_t(1) << 16) / entries_per_row + 1, least = (n + most - 1) / most;
    step = enough > least ? enough : least;
  }
  int64_t count() const { return (rows + step - 1) / step; }
  int64_t begin(int64_t chunk) const { return chunk * step; }
  int64_t end(int64_t chunk) const { return (chunk + 1) * step < rows ? (chunk + 1) * step : rows; }
};

// Memory of a call for one sample.
template <class T> struct CostMemory {
  static constexpr int64_t PIECES = 32;
  Sample<T> sample;
  Mean<T>* means;    // [n, H]
  Range<T>* ranges;  // [n, H], later the first [H] for all rows
  T *tables, *packed;
  int64_t table;  // entries of one

  void layout(Arena& arena, const CostTask<T>& task) {
    sample.layout(arena, task.rows, task.cols, true);
    means = arena.take<Mean<T>>(task.rows * task.heads), ranges = arena.take<Range<T>>(task.rows * task.heads);
    table = round_up(task.cols + LANES<T>, LANES<T>), tables = arena.take<T>(table * PIECES);
    packed = arena.take<T>(CosineShape<T>{task.rows, task.dim}.packed());
  }
};

// Row by row, for all heads: the semantic term of the row stays in cache. The first pass sees the ranges, the second writes;
// the distances are computed twice, which is cheaper than storing what is not scaled yet.
template <class T> void token_cost_one(const CostTask<T>& task, int64_t b, char* memory, Team* team) {
  const int64_t N = task.rows, M = task.cols, H = task.heads;
  Arena arena{memory};
  CostMemory<T> own;
  own.layout(arena, task);
  Sample<T>& s = own.sample;
  T* cost = task.cost + b * H * N * M;
  if (task.row_mask)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i = 0; i < N; ++i)
        if (!task.row_mask[b * N + i]) memset(cost + (h * N + i) * M, 0, size_t(M) * sizeof(T));
  read_sample(task, b, s, own.packed, team);
  const RowChunks chunks(s.n, H * M, CostMemory<T>::PIECES);
  for_chunks(team, chunks.count(), [&](int64_t chunk) {
    T* table = own.tables + chunk * own.table;
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i)
      for (int64_t h = 0; h < H; ++h) {
        Mean<T>& mean = own.means[i * H + h];
        const T* attention = task.attention + ((b * H + h) * N + s.rows[i]) * M;
        mean = mean_under(s, attention, h + 1 < H ? attention + N * M : attention - (H - 1) * N * M + M);
        if (!task.normalize) continue;
        fill_table(s, mean, table);
        own.ranges[i * H + h] = Range<T>();
        see_row(s, i, mean, table, own.ranges[i * H + h]);
      }
  });
  if (task.normalize)
    for (int64_t i = 1; i < s.n; ++i)
      for (int64_t h = 0; h < H; ++h) own.ranges[h].join(own.ranges[i * H + h]);
  for_chunks(team, chunks.count(), [&](int64_t chunk) {
    T* table = own.tables + chunk * own.table;
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i)
      for (int64_t h = 0; h < H; ++h) {
        const Mean<T>& mean = own.means[i * H + h];
        fill_table(s, mean, table);
        write_row(s, i, mean, table, task.normalize ? own.ranges + h : nullptr, cost + (h * N + s.rows[i]) * M);
      }
  });
}

template <class T> size_t cost_scratch(const CostTask<T>& task) {
  Arena count{nullptr};
  CostMemory<T>().layout(count, task);
  return count.used;
}

}  // namespace
