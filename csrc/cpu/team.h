// Work of one problem cut into chunks, by one thread or by a team.
#pragma once
#include "kernels.h"

namespace {
using pk::Team;

template <class X> struct RemoveReference { using Type = X; };
template <class X> struct RemoveReference<X&> { using Type = X; };

// body(chunk) for every chunk in [0, chunks); see Team for what chunks may do.
template <class Body> void for_chunks(Team* team, int64_t chunks, Body&& body) {
  if (team == nullptr || chunks <= 1) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
    return;
  }
  using Plain = typename RemoveReference<Body>::Type;
  team->run(team, [](void* context, int64_t chunk) { (*static_cast<Plain*>(context))(chunk); },
            const_cast<void*>(static_cast<const void*>(&body)), chunks);
}

// Items in chunks of `step`, large enough for a thread of its own: each of at least ENTRIES matrix entries, at most MOST.
struct Chunks {
  static constexpr int64_t ENTRIES = 1 << 16, MOST = 64;
  int64_t items, step, count;

  // even: step is even where it is not 1.
  static Chunks of(int64_t items, int64_t entries_per_item, bool even = false) {
    const int64_t entries = entries_per_item > 1 ? entries_per_item : 1;
    const int64_t least = (ENTRIES + entries - 1) / entries, fewest = (items + MOST - 1) / MOST;
    int64_t step = least > fewest ? least : fewest;
    if (even && step > 1) step += step % 2;
    return {items, step, (items + step - 1) / step};
  }
  // No fewer than `count`, and no more for fewer items or entries.
  static int64_t bound(int64_t items, int64_t entries_per_item) {
    const int64_t all = (items * entries_per_item + ENTRIES - 1) / ENTRIES;
    return all < 1 ? 1 : (all < MOST ? all : MOST);
  }
  int64_t begin(int64_t chunk) const { return chunk * step; }
  int64_t end(int64_t chunk) const { return chunk + 1 < count ? (chunk + 1) * step : items; }
};

}  // namespace
