// What the heads of a sample share in the token cost: its geometry and its semantic term.
#pragma once
#include "cosine.h"

namespace {

// raw_ij = semantic_ij + place_ij + time_ij for the n rows that exist. Video tokens come in runs of one time. The distance
// to a place and the distance in time are then looked up: a run whose places repeat those of the run before it shares their
// entries of the table. Tokens without such runs are one run, whose table holds place and time together.
template <class T> struct Sample {
  struct Run {
    int32_t first, last, table;  // tokens [first, last), and where their places begin in the table
    T time;
  };
  int64_t n, cols, runs, places;  // places: entries of the table
  bool timed;                     // the runs have times; else times are per token
  int32_t* rows;                  // [n]
  T *frame, *y, *x;               // [cols], 0 where masked
  T *place_y, *place_x;           // [places]
  Run* run;
  T* keep;                        // [cols] all bits set where the token exists, else none; or null
  T* semantic;                    // [n, cols], or null
  T time_weight, place_weight;

  void layout(Arena& arena, int64_t n_rows, int64_t n_cols, bool with_semantic) {
    cols = n_cols;
    rows = arena.take<int32_t>(n_rows);
    T** vectors[] = {&frame, &y, &x, &place_y, &place_x};
    for (T** vector : vectors) *vector = arena.take<T>(n_cols + LANES<T>);
    run = arena.take<Run>(n_cols / SHORT + 2);
    keep = arena.take<T>(n_cols + LANES<T>);
    semantic = with_semantic ? arena.take<T>(n_rows * n_cols) : nullptr;
  }

  bool exists(int64_t j) const { return keep == nullptr || keep[j] != 0; }
  // Lanes of tokens that do not exist become 0.
  Vec<T> clear(int64_t j, Vec<T> v) const { return (Vec<T>)((Int<T>)v & (Int<T>)load_any<T>(keep + j)); }

  static constexpr int64_t SHORT = 16;  // mean length of runs that are worth a loop each

  void read_geometry(const CostTask<T>& task, int64_t b) {
    const uint8_t* mask = task.col_mask ? task.col_mask + b * cols : nullptr;
    const T *times = task.frame + b * cols, *positions = task.positions + 2 * b * cols;
    T low = T(__builtin_inf()), high = -T(__builtin_inf());
    for (int64_t j = 0; j < cols; ++j) {
      const bool exists = mask == nullptr || mask[j];
      frame[j] = exists ? times[j] : T(0), y[j] = exists ? positions[2 * j] : T(0), x[j] = exists ? positions[2 * j + 1] : T(0);
      if (exists) low = times[j] < low ? times[j] : low, high = times[j] > high ? times[j] : high;
    }
    if (mask == nullptr) keep = nullptr;
    else
      for (int64_t j = 0; j < cols; ++j) memset(keep + j, mask[j] ? 0xff : 0, sizeof(T));
    const T range = high - low;
    time_weight = T(task.gamma) / (range > 0 ? range : T(1)), place_weight = task.place_weight;
    find_runs();
    T* const ends[] = {frame + cols, place_y + places, place_x + places};
    for (T* end : ends) memset(end, 0, sizeof(Vec<T>));  // read with weight 0
  }

  void find_runs() {
    runs = places = 0;
    for (int64_t first = 0, last; first < cols; first = last) {
      for (last = first + 1; last < cols && frame[last] == frame[first];) ++last;
      if (runs >= cols / SHORT + 1) {
        run[0] = {0, int32_t(cols), 0, T(0)}, runs = 1, timed = false, places = cols;
        memcpy(place_y, y, size_t(cols) * sizeof(T)), memcpy(place_x, x, size_t(cols) * sizeof(T));
        return;
      }
      const int64_t length = last - first;
      const size_t bytes = size_t(length) * sizeof(T);
      const Run* before = runs > 0 ? run + runs - 1 : nullptr;
      int32_t table = int32_t(places);
      if (before && before->last - before->first == length && memcmp(place_y + before->table, y + first, bytes) == 0 &&
          memcmp(place_x + before->table, x + first, bytes) == 0) {
        table = before->table;
      } else {
        memcpy(place_y + places, y + first, bytes), memcpy(place_x + places, x + first, bytes), places += length;
      }
      run[runs++] = {int32_t(first), int32_t(last), table, frame[first]};
    }
    timed = true;
  }
};

template <class T> struct Mean {  // expected time and place of a text token under its attention, and the sum of that
  T t, y, x, total;
};

// Sums in blocks: the rounding of one long chain of additions would show. next: the row that will be asked for next.
template <class T> Mean<T> mean_under(const Sample<T>& s, const T* __restrict__ attention, const T* next) {
  constexpr int64_t VL = LANES<T>, BLOCK_COLS = 64 * VL;
  Vec<T> all{}, all_t{}, all_y{}, all_x{};
  for (int64_t r = 0; r < s.runs; ++r) {
    const T *place_y = s.place_y + s.run[r].table - s.run[r].first, *place_x = s.place_x + s.run[r].table - s.run[r].first;
    for (int64_t from = s.run[r].first; from < s.run[r].last; from += BLOCK_COLS) {
      const int64_t to = from + BLOCK_COLS < s.run[r].last ? from + BLOCK_COLS : s.run[r].last;
      Vec<T> total{}, sum_t{}, sum_y{}, sum_x{};
      for (int64_t j = from; j < to; j += VL) {
        Vec<T> w = to - j < VL ? load_some<T>(attention + j, to - j) : load_any<T>(attention + j);
        __builtin_prefetch(next + j);
        if (s.keep) w = s.clear(j, w);
        total += w, sum_t += w * load_any<T>(s.frame + j);
        sum_y += w * load_any<T>(place_y + j), sum_x += w * load_any<T>(place_x + j);
      }
      all += total, all_t += sum_t, all_y += sum_y, all_x += sum_x;
    }
  }
  const T total = sum_lanes<T>(all), scale = T(1) / (total > T(1e-6) ? total : T(1e-6));
  return {sum_lanes<T>(all_t) * scale, sum_lanes<T>(all_y) * scale, sum_lanes<T>(all_x) * scale, total};
}

// Distances of a text token: in place, for every entry of the table, and in time where the runs have none. Never inlined:
// the two passes over a cost must see the same bits.
template <class T>
__attribute__((noinline)) void fill_table(const Sample<T>& s, const Mean<T>& mean, T* __restrict__ table) {
  const T *__restrict__ y = s.place_y, *__restrict__ x = s.place_x, *__restrict__ t = s.frame;
  const T weight = s.place_weight, time = s.timed ? T(0) : s.time_weight;
  for (int64_t k = 0; k < s.places; ++k) {
    const T dy = mean.y - y[k], dx = mean.x - x[k];
    table[k] = weight * T(__builtin_sqrt(dy * dy + dx * dx));
  }
  if (s.timed) return;
  for (int64_t k = 0; k < s.places; ++k) {
    const T dt = mean.t - t[k];
    table[k] += time * (dt < 0 ? -dt : dt);
  }
}

// use(j, raw cost of row i and tokens [j, j + count), count) for all tokens, some of them twice; count is LANES or less.
template <class T, class Use>
inline void each_cost(const Sample<T>& s, int64_t i, const Mean<T>& mean, const T* table, Use&& use) {
  constexpr int64_t VL = LANES<T>;
  const T* semantic = s.semantic + i * s.cols;
  for (int64_t r = 0; r < s.runs; ++r) {
    const int64_t first = s.run[r].first, last = s.run[r].last;
    const T* place = table + s.run[r].table - first;
    const T away = mean.t - s.run[r].time;
    const Vec<T> time = splat<T>(s.timed ? s.time_weight * (away < 0 ? -away : away) : T(0));
    if (last - first < VL) {
      use(first, load_some<T>(semantic + first, last - first) + (load_some<T>(place + first, last - first) + time), last - first);
      continue;
    }
    for (int64_t next = first; next < last; next += VL) {
      const int64_t j = next + VL <= last ? next : last - VL;
      use(j, load_any<T>(semantic + j) + (load_any<T>(place + j) + time), VL);
    }
  }
}

// Smallest and largest raw cost of a row over the tokens that exist.
template <class T> void see_row(const Sample<T>& s, int64_t i, const Mean<T>& mean, const T* table, Range<T>& range) {
  Vec<T> low = splat<T>(range.low), high = splat<T>(range.high), zero{};
  each_cost(s, i, mean, table, [&](int64_t j, Vec<T> raw, int64_t count) {
    if (count < LANES<T>)
      for (int64_t k = count; k < LANES<T>; ++k) raw[k] = raw[0];
    Vec<T> least = raw, most = raw, nothing = raw - raw;  // NaN as soon as one entry is not finite
    if (s.keep) {
      Vec<T> keep = load_any<T>(s.keep + j);
      if (count < LANES<T>)
        for (int64_t k = count; k < LANES<T>; ++k) keep[k] = keep[0];
      least = select<T>((Int<T>)keep, raw, splat<T>(T(__builtin_inf())));
      most = select<T>((Int<T>)keep, raw, splat<T>(-T(__builtin_inf())));
      nothing = (Vec<T>)((Int<T>)nothing & (Int<T>)keep);
    }
    low = vmin<T>(least, low), high = vmax<T>(most, high), zero += nothing;
  });
  range.low = min_lanes<T>(low), range.high = max_lanes<T>(high);
  range.finite = range.finite && sum_lanes<T>(zero) == 0;
}

template <class T> T divisor_of(const Range<T>& range) {
  const T span = range.high - range.low;
  return span > T(1e-6) ? span : T(1e-6);
}

// The cost of a row, scaled by the range unless that is null; 0 where a token does not exist.
template <class T>
void write_row(const Sample<T>& s, int64_t i, const Mean<T>& mean, const T* table, const Range<T>* range, T* cost) {
  const Vec<T> low = splat<T>(range ? range->low : T(0));
  const Vec<T> divisor = splat<T>(!range ? T(1) : range->finite ? divisor_of(*range) : T(__builtin_nan("")));
  each_cost(s, i, mean, table, [&](int64_t j, Vec<T> raw, int64_t count) {
    // A division, so that the largest entry is exactly 1: the gradient looks for it.
    Vec<T> value = (raw - low) / divisor;
    if (s.keep) value = s.clear(j, value);
    if (count < LANES<T>) memcpy(cost + j, &value, size_t(count) * sizeof(T));
    else store_any<T>(cost + j, value);
  });
}

}  // namespace
