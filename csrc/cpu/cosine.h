// 1 - cosine between all text and all video features of a sample. The video features, which are many, are read as they lie.
#pragma once
#include "problem.h"

namespace {

// A tile is the dot products of some video rows with some text rows, one vector of partial sums each: as many as stay in
// registers. What a tile reads of the features is cut into pieces of PIECE entries, so that its text rows stay in the
// first-level cache while a block of video rows, which fits the second-level cache, passes by.
constexpr int TEXT_TILE = 4, VIDEO_TILE = PK_VECTOR_BYTES == 64 ? 6 : 3, VIDEO_BLOCK = 24;
template <class T> constexpr int64_t PIECE = 4096 / sizeof(T);

template <class T> struct CosineShape {
  int64_t rows, dim;
  int64_t tiles() const { return (rows + TEXT_TILE - 1) / TEXT_TILE; }
  int64_t vectors() const { return (dim + LANES<T> - 1) / LANES<T>; }
  int64_t packed() const { return tiles() * TEXT_TILE * vectors() * LANES<T>; }
  // Text rows of a tile from vector k on: vector by vector, the rows of the tile side by side.
  const T* at(const T* packed, int64_t tile, int64_t k) const { return packed + (tile * vectors() + k) * TEXT_TILE * LANES<T>; }
};

template <class T> Vec<T> load_some(const T* p, int64_t count) {  // the first count < LANES entries, then 0
  Vec<T> v{};
  memcpy(&v, p, size_t(count) * sizeof(T));
  return v;
}

// 1 / max(norm, 1e-12), as torch.nn.functional.normalize divides.
template <class T> T inverse_norm(T squared) {
  const T norm = T(__builtin_sqrt(squared));
  return T(1) / (norm < T(1e-12) ? T(1e-12) : norm);
}
template <class T> T dot_product(const T* x, const T* y, int64_t dim) {
  Vec<T> even{}, odd{};
  int64_t k = 0;
  for (; k + 2 * LANES<T> <= dim; k += 2 * LANES<T>) {
    even += load_any<T>(x + k) * load_any<T>(y + k);
    odd += load_any<T>(x + k + LANES<T>) * load_any<T>(y + k + LANES<T>);
  }
  for (; k + LANES<T> <= dim; k += LANES<T>) even += load_any<T>(x + k) * load_any<T>(y + k);
  if (k < dim) even += load_some<T>(x + k, dim - k) * load_some<T>(y + k, dim - k);
  return sum_lanes<T>(even + odd);
}
template <class T> T squared_norm(const T* x, int64_t dim) { return dot_product(x, x, dim); }

// Unit text features of the rows in index, in the order the tiles read them; rows and entries that fill up are 0.
template <class T> void pack_text(const CosineShape<T>& shape, const T* text, const int32_t* index, T* packed) {
  constexpr int VL = LANES<T>;
  memset(packed, 0, size_t(shape.packed()) * sizeof(T));
  for (int64_t i = 0; i < shape.rows; ++i) {
    const T* source = text + int64_t(index[i]) * shape.dim;
    const T scale = inverse_norm(squared_norm(source, shape.dim));
    T* to = packed + (i / TEXT_TILE) * shape.vectors() * TEXT_TILE * VL + (i % TEXT_TILE) * VL;
    for (int64_t k = 0; k < shape.dim; ++k) to[k / VL * TEXT_TILE * VL + k % VL] = source[k] * scale;
  }
}

// Dot products of VIDEO_TILE video rows with a tile of text rows.
template <class T>
inline void dot_tile(const T* const* video, const T* text, int64_t count, T (&result)[VIDEO_TILE][TEXT_TILE]) {
  constexpr int VL = LANES<T>;
  Vec<T> dot[VIDEO_TILE][TEXT_TILE] = {};
  const T* x[VIDEO_TILE];
  for (int v = 0; v < VIDEO_TILE; ++v) x[v] = video[v];
  int64_t k = 0;
  for (; k + VL <= count; k += VL, text += TEXT_TILE * VL) {
    Vec<T> value[VIDEO_TILE];
#pragma GCC unroll 6
    for (int v = 0; v < VIDEO_TILE; ++v) value[v] = load_any<T>(x[v] + k);
#pragma GCC unroll 4
    for (int t = 0; t < TEXT_TILE; ++t) {
      const Vec<T> y = load<T>(text + t * VL);
#pragma GCC unroll 6
      for (int v = 0; v < VIDEO_TILE; ++v) dot[v][t] += value[v] * y;
    }
  }
  if (k < count)
    for (int v = 0; v < VIDEO_TILE; ++v) {
      const Vec<T> rest = load_some<T>(x[v] + k, count - k);
      for (int t = 0; t < TEXT_TILE; ++t) dot[v][t] += rest * load<T>(text + t * VL);
    }
  for (int v = 0; v < VIDEO_TILE; ++v)
    for (int t = 0; t < TEXT_TILE; ++t) result[v][t] = sum_lanes<T>(dot[v][t]);
}

// semantic[i, j] = 1 - cos(text_i, video_j) for one block of video rows.
template <class T>
void cosine_block(const CosineShape<T>& shape, const T* packed, const T* video, int64_t cols, int64_t block, T* semantic) {
  const int64_t first = block * VIDEO_BLOCK, last = first + VIDEO_BLOCK < cols ? first + VIDEO_BLOCK : cols;
  T scale[VIDEO_BLOCK];  // and the block is in cache
  for (int64_t j = first; j < last; ++j) scale[j - first] = inverse_norm(squared_norm(video + j * shape.dim, shape.dim));
  // Meanwhile the next block comes from memory, a few lines at a time.
  const int64_t row_bytes = shape.dim * int64_t(sizeof(T)), calls = shape.tiles() * ((last - first) / VIDEO_TILE + 1);
  const char* ahead = reinterpret_cast<const char*>(video + last * shape.dim);
  const char* end = ahead + (cols - last < VIDEO_BLOCK ? cols - last : VIDEO_BLOCK) * row_bytes;
  const int64_t lines = (end - ahead) / 64 / calls + 1;
  for (int64_t from = 0; from < shape.dim; from += PIECE<T>) {
    const int64_t count = shape.dim - from < PIECE<T> ? shape.dim - from : PIECE<T>;
    for (int64_t tile = 0; tile < shape.tiles(); ++tile) {
      const T* text = shape.at(packed, tile, from / LANES<T>);
      const int64_t left = shape.rows - tile * TEXT_TILE, rows = left < TEXT_TILE ? left : int64_t(TEXT_TILE);
      for (int64_t j = first; j < last; j += VIDEO_TILE) {
        const T* tile_rows[VIDEO_TILE];
        for (int v = 0; v < VIDEO_TILE; ++v)  // beyond the end: the last row once more
          tile_rows[v] = video + (j + v < cols ? j + v : cols - 1) * shape.dim + from;
        T dot[VIDEO_TILE][TEXT_TILE];
        dot_tile<T>(tile_rows, text, count, dot);
        for (int64_t line = 0; line < lines && ahead < end; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        for (int64_t t = 0; t < rows; ++t) {
          T* to = semantic + (tile * TEXT_TILE + t) * cols + j;
          for (int v = 0; v < VIDEO_TILE && j + v < last; ++v) to[v] = from > 0 ? to[v] + dot[v][t] : dot[v][t];
        }
      }
    }
  }
  for (int64_t i = 0; i < shape.rows; ++i)
    for (int64_t j = first; j < last; ++j) semantic[i * cols + j] = T(1) - semantic[i * cols + j] * scale[j - first];
}

}  // namespace
