// Gradient of the token cost of one sample with respect to text, video and attention.
#pragma once
#include "feature_gradient.h"
#include "token_cost.h"

namespace {

// What the scaling of a head needs of a row, added up over its rows.
template <class T> struct ScalingSums {
  double grad = 0, grad_cost = 0;  // sum of the gradient, and of the gradient times the cost
  int64_t lows = 0, highs = 0;     // entries at 0 and at 1
  T most = -T(__builtin_inf());    // largest cost

  void see(const Sample<T>& s, const T* grads, const T* cost) {
    constexpr int64_t VL = LANES<T>, BLOCK_COLS = 64 * VL;
    const Vec<T> one = splat<T>(T(1));
    Vec<T> top = splat<T>(most);
    for (int64_t from = 0; from < s.cols; from += BLOCK_COLS) {  // the rounding of one long chain of additions would show
      const int64_t to = from + BLOCK_COLS < s.cols ? from + BLOCK_COLS : s.cols;
      Vec<T> sum{}, sum_cost{}, low{}, high{};
      for (int64_t j = from; j < to; j += VL) {
        const int64_t count = to - j < VL ? to - j : VL;
        Vec<T> g = load_part(grads + j, count, T(0)), c = load_part(cost + j, count, BETWEEN);
        if (s.keep) g = s.clear(j, g), c = select<T>((Int<T>)load_any<T>(s.keep + j), c, splat<T>(BETWEEN));
        sum += g, sum_cost += g * c, top = vmax<T>(c, top);
        low += (Vec<T>)((Int<T>)(c == Vec<T>{}) & (Int<T>)one), high += (Vec<T>)((Int<T>)(c == one) & (Int<T>)one);
      }
      grad += double(sum_lanes<T>(sum)), grad_cost += double(sum_lanes<T>(sum_cost));
      lows += int64_t(sum_lanes<T>(low)), highs += int64_t(sum_lanes<T>(high));
    }
    most = max_lanes<T>(top);
  }
  static constexpr T BETWEEN = T(-1);  // a cost that is no extreme: stands for what does not exist
  static Vec<T> load_part(const T* p, int64_t count, T rest) {
    Vec<T> v = splat<T>(rest);
    if (count == LANES<T>) return load_any<T>(p);
    memcpy(&v, p, size_t(count) * sizeof(T));
    return v;
  }
};

// The gradient of the raw cost: scale * grad, and at_low and at_high more at the entries at 0 and at 1.
template <class T> struct ScalingGradient {
  T scale = 1, at_low = 0, at_high = 0;
};

template <class T> T raw_cost(const CostTask<T>& task, const Sample<T>& s, int64_t b, const Mean<T>& mean, int64_t i, int64_t j) {
  const T *text = task.text + (b * task.rows + s.rows[i]) * task.dim, *video = task.video + (b * task.cols + j) * task.dim;
  const T dot = dot_product(text, video, task.dim);
  const T cosine = dot * inverse_norm(squared_norm(text, task.dim)) * inverse_norm(squared_norm(video, task.dim));
  const T dt = mean.t - s.frame[j], dy = mean.y - s.y[j], dx = mean.x - s.x[j];
  return T(1) - cosine + s.time_weight * (dt < 0 ? -dt : dt) + s.place_weight * T(__builtin_sqrt(dy * dy + dx * dx));
}

// cost = (raw - low) / divisor: what moves low and the divisor is shared by the entries at the extremes.
template <class T>
ScalingGradient<T> scaling_gradient(const CostTask<T>& task, const Sample<T>& s, int64_t b, int64_t h, const Mean<T>* means,
                                    const ScalingSums<T>* rows) {
  const int64_t H = task.heads;
  ScalingSums<T> all;
  int64_t low_row = -1, high_row = -1;
  for (int64_t i = 0; i < s.n; ++i) {
    const ScalingSums<T>& row = rows[i * H + h];
    all.grad += row.grad, all.grad_cost += row.grad_cost, all.lows += row.lows, all.highs += row.highs;
    if (row.lows > 0 && low_row < 0) low_row = i;
    if (row.most > all.most) all.most = row.most, high_row = i;
  }
  const auto raw_where = [&](int64_t i, T value) {
    const T* cost = task.cost + ((b * H + h) * task.rows + s.rows[i]) * s.cols;
    int64_t j = 0;
    while (j + 1 < s.cols && !(cost[j] == value && s.exists(j))) ++j;
    return raw_cost(task, s, b, means[i * H + h], i, j);
  };
  const T nan = T(__builtin_nan(""));
  if (low_row < 0 || high_row < 0) return {nan, nan, nan};  // the cost is not finite
  const T span = raw_where(high_row, all.most) - raw_where(low_row, T(0));
  const T divisor = span > T(1e-6) ? span : T(1e-6);
  const double to_divisor = span > T(1e-6) ? -all.grad_cost / double(divisor) : 0.0;
  const double to_low = -all.grad / double(divisor) - to_divisor;
  return {T(1) / divisor, T(to_low / double(all.lows)), T(to_divisor / double(all.highs > 0 ? all.highs : 1))};
}

// Directions from a text token, in place for every entry of the table and in time where the runs have none.
template <class T>
void fill_directions(const Sample<T>& s, const Mean<T>& mean, T* __restrict__ up, T* __restrict__ across, T* __restrict__ later) {
  const T *__restrict__ y = s.place_y, *__restrict__ x = s.place_x, *__restrict__ t = s.frame;
  for (int64_t k = 0; k < s.places; ++k) {
    const T dy = mean.y - y[k], dx = mean.x - x[k], squared = dy * dy + dx * dx;
    const T inverse = squared > 0 ? T(1) / T(__builtin_sqrt(squared)) : T(0);  // the subgradient 0 where the distance is 0
    up[k] = dy * inverse, across[k] = dx * inverse;
  }
  if (!s.timed)
    for (int64_t k = 0; k < s.places; ++k) later[k] = sign(mean.t - t[k]);
  T* const ends[] = {up + s.places, across + s.places, later + s.places};
  for (T* end : ends) memset(end, 0, sizeof(Vec<T>));  // read with weight 0
}

// Row i of a head: adds its part to semantic[0..cols) and writes the gradient of the attention.
template <class T>
void row_gradient(const Sample<T>& s, const Mean<T>& mean, const ScalingGradient<T>& by, const T* grads, const T* cost, T* tables,
                  T* semantic, T* result) {
  constexpr int64_t VL = LANES<T>, BLOCK_COLS = 64 * VL;
  const int64_t room = s.cols + VL;
  T *up = tables, *across = up + room, *later = across + room;
  fill_directions(s, mean, up, across, later);
  const Vec<T> scale = splat<T>(by.scale), at_low = splat<T>(by.at_low), at_high = splat<T>(by.at_high), one = splat<T>(T(1));
  Vec<T> all_t{}, all_y{}, all_x{};
  for (int64_t r = 0; r < s.runs; ++r) {
    const int64_t first = s.run[r].first, last = s.run[r].last, table = s.run[r].table - first;
    const Vec<T> direction = splat<T>(sign(mean.t - s.run[r].time));
    for (int64_t from = first; from < last; from += BLOCK_COLS) {
      const int64_t to = from + BLOCK_COLS < last ? from + BLOCK_COLS : last;
      Vec<T> sum_t{}, sum_y{}, sum_x{};
      for (int64_t j = from; j < to; j += VL) {
        const int64_t count = to - j < VL ? to - j : VL;
        const Vec<T> c = ScalingSums<T>::load_part(cost + j, count, ScalingSums<T>::BETWEEN);
        Vec<T> g = ScalingSums<T>::load_part(grads + j, count, T(0)) * scale;
        g += (Vec<T>)((Int<T>)(c == Vec<T>{}) & (Int<T>)at_low) + (Vec<T>)((Int<T>)(c == one) & (Int<T>)at_high);
        if (s.keep) g = s.clear(j, g);
        store_any<T>(semantic + j, load_any<T>(semantic + j) - g);
        sum_t += g * (s.timed ? direction : load_any<T>(later + table + j));
        sum_y += g * load_any<T>(up + table + j), sum_x += g * load_any<T>(across + table + j);
      }
      all_t += sum_t, all_y += sum_y, all_x += sum_x;
    }
  }
  // The means are sums over attention / total.
  const T to_t = s.time_weight * sum_lanes<T>(all_t), to_y = s.place_weight * sum_lanes<T>(all_y);
  const T to_x = s.place_weight * sum_lanes<T>(all_x);
  const bool empty = mean.total < T(1e-6);
  const T divisor = empty ? T(1e-6) : mean.total, along = empty ? T(0) : to_t * mean.t + to_y * mean.y + to_x * mean.x;
  const T per_t = to_t / divisor, per_y = to_y / divisor, per_x = to_x / divisor, less = along / divisor;
  T* part = up;
  for (int64_t k = 0; k < s.places; ++k) part[k] = per_y * s.place_y[k] + per_x * s.place_x[k];
  if (!s.timed)
    for (int64_t k = 0; k < s.places; ++k) part[k] += per_t * s.frame[k];
  for (int64_t r = 0; r < s.runs; ++r) {
    const int64_t first = s.run[r].first, last = s.run[r].last;
    const Vec<T> base = splat<T>((s.timed ? per_t * s.run[r].time : T(0)) - less);
    for (int64_t j = first; j < last; j += VL) {
      Vec<T> g = load_any<T>(part + s.run[r].table - first + j) + base;
      if (s.keep) g = s.clear(j, g);
      if (last - j < VL) memcpy(result + j, &g, size_t(last - j) * sizeof(T));
      else store_any<T>(result + j, g);
    }
  }
}

template <class T> struct GradientMemory {
  static constexpr int64_t PIECES = 16;
  Sample<T> sample;
  Mean<T>* means;         // [n, H]
  ScalingSums<T>* sums;   // [n, H]
  ScalingGradient<T>* by;  // [H]
  T* tables;              // [PIECES, 4, cols + LANES]
  FeatureGradient<T> features;

  void layout(Arena& arena, const CostTask<T>& task) {
    sample.layout(arena, task.rows, task.cols, false);
    means = arena.take<Mean<T>>(task.rows * task.heads), sums = arena.take<ScalingSums<T>>(task.rows * task.heads);
    by = arena.take<ScalingGradient<T>>(task.heads);
    tables = arena.take<T>(PIECES * 4 * (task.cols + LANES<T>));
    features.layout(arena, task.rows, task.cols, task.dim);
  }
};

template <class T> void token_cost_gradient_one(const CostGradientTask<T>& gradient, int64_t b, char* memory, Team* team) {
  const CostTask<T>& task = gradient.cost;
  const int64_t N = task.rows, M = task.cols, H = task.heads;
  Arena arena{memory};
  GradientMemory<T> own;
  own.layout(arena, task);
  Sample<T>& s = own.sample;
  s.n = gather(task.row_mask ? task.row_mask + b * N : nullptr, N, s.rows);
  s.read_geometry(task, b);
  T *by_attention = gradient.attention + b * H * N * M, *by_text = gradient.text + b * N * task.dim;
  for (int64_t i = 0; i < N && task.row_mask; ++i) {
    if (task.row_mask[b * N + i]) continue;
    memset(by_text + i * task.dim, 0, size_t(task.dim) * sizeof(T));
    for (int64_t h = 0; h < H; ++h) memset(by_attention + (h * N + i) * M, 0, size_t(M) * sizeof(T));
  }
  const auto entry = [&](int64_t i, int64_t h) { return ((b * H + h) * N + s.rows[i]) * M; };
  const RowChunks chunks(s.n, H * M, GradientMemory<T>::PIECES);
  for_chunks(team, chunks.count(), [&](int64_t chunk) {
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i)
      for (int64_t h = 0; h < H; ++h) {
        const T* attention = task.attention + entry(i, h);
        own.means[i * H + h] = mean_under(s, attention, attention);
        own.sums[i * H + h] = ScalingSums<T>();
        if (task.normalize) own.sums[i * H + h].see(s, gradient.grad + entry(i, h), task.cost + entry(i, h));
      }
  });
  for (int64_t h = 0; h < H; ++h)
    own.by[h] = task.normalize ? scaling_gradient(task, s, b, h, own.means, own.sums) : ScalingGradient<T>();
  for_chunks(team, chunks.count(), [&](int64_t chunk) {
    T* tables = own.tables + chunk * 4 * (M + LANES<T>);
    T* semantic = tables + 3 * (M + LANES<T>);
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      memset(semantic, 0, size_t(M) * sizeof(T));
      for (int64_t h = 0; h < H; ++h)
        row_gradient(s, own.means[i * H + h], own.by[h], gradient.grad + entry(i, h), task.cost + entry(i, h), tables, semantic,
                     gradient.attention + entry(i, h));
      own.features.put_row(i, semantic);
    }
  });
  const int64_t of_video = b * M * task.dim;
  own.features.run(s, task.text + b * N * task.dim, task.video + of_video, by_text, gradient.video + of_video, team);
}

template <class T> size_t gradient_scratch(const CostTask<T>& task) {
  Arena count{nullptr};
  GradientMemory<T>().layout(count, task);
  return count.used;
}

}  // namespace
