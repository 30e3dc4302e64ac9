// Gradient of the features behind a matrix of cosines: two products with that matrix's gradient S, and the norms.
#pragma once
#include "token_sample.h"

namespace {

// S [n, cols] lies in blocks of VIDEO_BLOCK columns, row after row, and features in panels of WIDTH entries. A tile is
// TILE_ROWS rows of a result by one panel, in registers.
constexpr int TILE_ROWS = 6, TILE_VECTORS = PK_VECTOR_BYTES == 64 ? 4 : 2, TEXT_BLOCKS = 4;
template <class T> constexpr int WIDTH = TILE_VECTORS * LANES<T>;
static_assert(VIDEO_BLOCK % TILE_ROWS == 0);

// to[r] (+)= sum_k S[k * K_STRIDE + r * R_STRIDE] right[k] for r < TILE_ROWS, over `blocks` pieces of count each.
template <class T, int K_STRIDE, int R_STRIDE, bool ADD>
inline void product_tile(const T* s, int64_t s_stride, const T* right, int64_t blocks, int64_t count, T* to) {
  Vec<T> sum[TILE_ROWS][TILE_VECTORS] = {};
  for (int64_t block = 0; block < blocks; ++block, s += s_stride, right += count * WIDTH<T>)
    for (int64_t k = 0; k < count; ++k) {
      Vec<T> value[TILE_VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < TILE_VECTORS; ++v) value[v] = load<T>(right + k * WIDTH<T> + v * LANES<T>);
#pragma GCC unroll 6
      for (int r = 0; r < TILE_ROWS; ++r) {
        const Vec<T> weight = splat<T>(s[k * K_STRIDE + r * R_STRIDE]);
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; ++v) sum[r][v] += weight * value[v];
      }
    }
  for (int r = 0; r < TILE_ROWS; ++r)
    for (int v = 0; v < TILE_VECTORS; ++v) {
      T* at = to + r * WIDTH<T> + v * LANES<T>;
      store<T>(at, ADD ? load<T>(at) + sum[r][v] : sum[r][v]);
    }
}

// x -> gradient through x / max(norm, 1e-12), in place: (grad - unit (grad . unit)) / norm.
template <class T> void through_norm(T* grad, const T* feature, int64_t dim, T inverse) {
  const T along = dot_product(grad, feature, dim) * inverse * inverse;
  for (int64_t k = 0; k < dim; ++k) grad[k] = (grad[k] - feature[k] * along) * inverse;
}

template <class T> struct FeatureGradient {
  int64_t rows, cols, dim, blocks, panels;
  T* s;        // [blocks, rows, VIDEO_BLOCK], rows a multiple of TILE_ROWS
  T* unit;     // [panels, rows, WIDTH] unit text features
  T* by_unit;  // [panels, rows, WIDTH] their gradient
  T* inverse;  // [cols] inverse norms of the video features

  void layout(Arena& arena, int64_t n_rows, int64_t n_cols, int64_t n_dim) {
    rows = round_up(n_rows, TILE_ROWS), cols = n_cols, dim = n_dim;
    blocks = round_up(cols, VIDEO_BLOCK) / VIDEO_BLOCK, panels = round_up(dim, WIDTH<T>) / WIDTH<T>;
    s = arena.take<T>(blocks * rows * VIDEO_BLOCK);
    unit = arena.take<T>(panels * rows * WIDTH<T>), by_unit = arena.take<T>(panels * rows * WIDTH<T>);
    inverse = arena.take<T>(cols);
  }
  void put_row(int64_t i, const T* row) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * VIDEO_BLOCK, count = cols - first < VIDEO_BLOCK ? cols - first : VIDEO_BLOCK;
      T* to = s + (block * rows + i) * VIDEO_BLOCK;
      memset(to, 0, VIDEO_BLOCK * sizeof(T)), memcpy(to, row + first, size_t(count) * sizeof(T));
    }
  }

  void run(const Sample<T>& sample, const T* text, const T* video, T* by_text, T* by_video, Team* team) {
    const int64_t n = sample.n;
    memset(unit, 0, size_t(panels * rows * WIDTH<T>) * sizeof(T));
    memset(by_unit, 0, size_t(panels * rows * WIDTH<T>) * sizeof(T));
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t i = n; i < rows; ++i) memset(s + (block * rows + i) * VIDEO_BLOCK, 0, VIDEO_BLOCK * sizeof(T));
    for (int64_t i = 0; i < n; ++i) {
      const T* source = text + sample.rows[i] * dim;
      const T scale = inverse_norm(squared_norm(source, dim));
      for (int64_t k = 0; k < dim; ++k) unit[(k / WIDTH<T> * rows + i) * WIDTH<T> + k % WIDTH<T>] = source[k] * scale;
    }
    for_chunks(team, blocks, [&](int64_t block) { video_block(sample, block, video, by_video); });
    // Pieces of the width of the features: each is a sum over all video tokens, in their order.
    const int64_t step = 1024 / (WIDTH<T> * int64_t(sizeof(T)));
    for_chunks(team, (panels + step - 1) / step, [&](int64_t piece) {
      for (int64_t block = 0; block < blocks; block += TEXT_BLOCKS)
        for (int64_t panel = piece * step; panel < (piece + 1) * step && panel < panels; ++panel)
          text_panel(sample, block, panel, video);
    });
    for (int64_t i = 0; i < n; ++i) {
      T* to = by_text + sample.rows[i] * dim;
      const T* source = text + sample.rows[i] * dim;
      for (int64_t k = 0; k < dim; ++k) to[k] = by_unit[(k / WIDTH<T> * rows + i) * WIDTH<T> + k % WIDTH<T>];
      through_norm(to, source, dim, inverse_norm(squared_norm(source, dim)));
    }
  }

  // S^T unit for the video tokens of a block, and on through their norms.
  void video_block(const Sample<T>& sample, int64_t block, const T* video, T* by_video) const {
    alignas(64) T tile[TILE_ROWS * WIDTH<T>];
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t k = panel * WIDTH<T>, width = dim - k < WIDTH<T> ? dim - k : WIDTH<T>;
      for (int64_t j = 0; j < VIDEO_BLOCK && block * VIDEO_BLOCK + j < cols; j += TILE_ROWS) {
        product_tile<T, VIDEO_BLOCK, 1, false>(s + block * rows * VIDEO_BLOCK + j, 0, unit + panel * rows * WIDTH<T>, 1, sample.n,
                                               tile);
        for (int64_t r = 0; r < TILE_ROWS && block * VIDEO_BLOCK + j + r < cols; ++r) {
          const int64_t at = (block * VIDEO_BLOCK + j + r) * dim + k;
          memcpy(by_video + at, tile + r * WIDTH<T>, size_t(width) * sizeof(T));
          __builtin_prefetch(video + at);  // for the norms
        }
      }
    }
    for (int64_t j = block * VIDEO_BLOCK; j < (block + 1) * VIDEO_BLOCK && j < cols; ++j) {
      T* to = by_video + j * dim;
      if (!sample.exists(j)) {
        inverse[j] = 0, memset(to, 0, size_t(dim) * sizeof(T));
        continue;
      }
      inverse[j] = inverse_norm(squared_norm(video + j * dim, dim));
      through_norm(to, video + j * dim, dim, inverse[j]);
    }
  }

  // What some blocks of video tokens, from block on, add to one panel of S unit(video).
  void text_panel(const Sample<T>& sample, int64_t block, int64_t panel, const T* video) const {
    alignas(64) T right[TEXT_BLOCKS * VIDEO_BLOCK * WIDTH<T>];
    const int64_t together = blocks - block < TEXT_BLOCKS ? blocks - block : int64_t(TEXT_BLOCKS);
    const int64_t k = panel * WIDTH<T>, width = dim - k < WIDTH<T> ? dim - k : WIDTH<T>, first = block * VIDEO_BLOCK;
    for (int64_t j = 0; j < together * VIDEO_BLOCK; ++j) {
      T* to = right + j * WIDTH<T>;
      if (first + j >= cols || !sample.exists(first + j)) {
        memset(to, 0, WIDTH<T> * sizeof(T));
        continue;
      }
      const T* source = video + (first + j) * dim + k;
      __builtin_prefetch(source + WIDTH<T>);  // the next panel
      const Vec<T> scale = splat<T>(inverse[first + j]);
      for (int64_t v = 0; v < TILE_VECTORS; ++v) {
        const int64_t left = width - v * LANES<T>;
        const T* from = source + v * LANES<T>;
        const Vec<T> value = left >= LANES<T> ? load_any<T>(from) : left > 0 ? load_some<T>(from, left) : Vec<T>{};
        store<T>(to + v * LANES<T>, value * scale);
      }
    }
    for (int64_t i = 0; i < rows; i += TILE_ROWS)
      product_tile<T, 1, VIDEO_BLOCK, true>(s + (block * rows + i) * VIDEO_BLOCK, rows * VIDEO_BLOCK, right, together, VIDEO_BLOCK,
                                            by_unit + (panel * rows + i) * WIDTH<T>);
  }
};

}  // namespace
