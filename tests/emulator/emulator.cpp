// The scheduler of emulator.h. Never compiled with sanitizers: it tells them about fibers and barriers instead.
#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#ifndef __x86_64__
#error "the emulator switches stacks by x86-64 code"
#endif

#define PK_WEAK __attribute__((weak))
extern "C" {
PK_WEAK void* __tsan_create_fiber(unsigned);
PK_WEAK void* __tsan_get_current_fiber();
PK_WEAK void __tsan_switch_to_fiber(void*, unsigned);
PK_WEAK void __tsan_read_range(void*, unsigned long);
PK_WEAK void __tsan_write_range(void*, unsigned long);
PK_WEAK void __tsan_acquire(void*);
PK_WEAK void __tsan_release(void*);
PK_WEAK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
PK_WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
PK_WEAK void __asan_unpoison_memory_region(const volatile void*, size_t);

// Push what a call must preserve, change stacks, pop.
void pk_switch_stack(void** save, void* load);
asm(R"(.text
.globl pk_switch_stack
.type pk_switch_stack,@function
pk_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
}

namespace pk {
namespace emulator {

Thread* current = nullptr;

namespace {

constexpr size_t STACK = 256 * 1024;
constexpr int LANES = 32;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Block;
struct Fiber {
  Thread thread;
  Block* block;
  char* stack = nullptr;
  void *top = nullptr, *tsan = nullptr, *fake_stack = nullptr;
  bool done;
  Place waits;
  std::vector<Copy> copies;
  int groups;
};
struct WarpCall {  // lanes that have arrived at one call
  unsigned mask = 0, arrived = 0;
  size_t bytes;
  Place place;
  char brought[LANES][64];
  void* wanted[LANES];
  char order;
};
struct Barrier {
  size_t arrived = 0;
  unsigned turn = 0;
  Place place{nullptr, 0};
  char order[2];
};
struct Shared {
  const void* key;
  char* memory;
  size_t bytes;
};
struct Block {
  unsigned rank;
  size_t running;
  std::vector<Fiber*> fibers;
  std::vector<WarpCall> calls;  // two a warp: its lanes may be split between two masks
  Barrier barrier;
  std::vector<Shared> shared;  // the first is the dynamic one
  struct Cluster* cluster;
};
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
  size_t threads, running;
};

struct Scheduler {
  std::vector<std::unique_ptr<Fiber>> pool;
  std::vector<Fiber*> ready;  // a ring; as long as there are fibers, so that it never moves
  size_t first = 0, waiting = 0;
  Fiber* running = nullptr;
  void *top = nullptr, *tsan = nullptr, *fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  const std::function<void()>* kernel = nullptr;
  std::mt19937_64 random;
  bool shuffle = false, with_tsan = false, with_asan = false;
  size_t live = 0, idle = 0;  // idle: waits in a row without any progress
  char begin, end;
  char *arena = nullptr, *arena_next = nullptr;  // for ThreadSanitizer: addresses that are never used twice in a launch
  size_t arena_bytes = 0;
};
Scheduler& scheduler = *new Scheduler;  // outlives everything

void order_before(char* what) {
  if (scheduler.with_tsan) __tsan_release(what);
}
void order_after(char* what) {
  if (scheduler.with_tsan) __tsan_acquire(what);
}

void switch_to(Fiber* from, Fiber* to) {  // null: the scheduler
  Scheduler& s = scheduler;
  if (s.with_asan) {
    void** keep = from == nullptr ? &s.fake_stack : from->done ? nullptr : &from->fake_stack;
    __sanitizer_start_switch_fiber(keep, to ? to->stack : s.stack, to ? STACK : s.stack_bytes);
  }
  if (s.with_tsan) __tsan_switch_to_fiber(to ? to->tsan : s.tsan, 1);  // 1: the switch orders nothing
  s.running = to, current = to ? &to->thread : nullptr;
  pk_switch_stack(from ? &from->top : &s.top, to ? to->top : s.top);
  if (!s.with_asan) return;
  if (from != nullptr) __sanitizer_finish_switch_fiber(from->fake_stack, &s.stack, &s.stack_bytes);
  else __sanitizer_finish_switch_fiber(s.fake_stack, nullptr, nullptr);
}
void park(Place place) {
  Fiber* fiber = scheduler.running;
  fiber->waits = place;
  switch_to(fiber, nullptr);
}
void enqueue(Fiber* fiber) {
  Scheduler& s = scheduler;
  s.ready[(s.first + s.waiting++) % s.ready.size()] = fiber;
}
Fiber* next_fiber() {
  Scheduler& s = scheduler;
  if (s.shuffle) std::swap(s.ready[s.first], s.ready[(s.first + s.random() % s.waiting) % s.ready.size()]);
  Fiber* fiber = s.ready[s.first];
  s.first = (s.first + 1) % s.ready.size(), --s.waiting;
  return fiber;
}
void wake(Fiber* fiber) { enqueue(fiber), scheduler.idle = 0; }
// Not memcpy: ThreadSanitizer listens to that one, here too.
void copy_bytes(void* to, const void* from, size_t bytes) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes)::"memory");
}

void fiber_main() {
  Fiber* fiber = scheduler.running;
  if (scheduler.with_asan) __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
  order_after(&scheduler.begin);
  (*scheduler.kernel)();
  if (!fiber->copies.empty()) fail({"end of the kernel", 0}, "an asynchronous copy was never waited for");
  order_before(&scheduler.end);
  fiber->done = true, scheduler.idle = 0;
  --fiber->block->running, --fiber->block->cluster->running, --scheduler.live;
  switch_to(fiber, nullptr);
  abort();
}

char* new_shared(size_t bytes) {
  Scheduler& s = scheduler;
  void* memory = nullptr;
  if (s.with_tsan) {
    memory = s.arena_next, s.arena_next += (bytes + 255) & ~size_t(127);
    if (s.arena_next > s.arena + s.arena_bytes) fail({"launch", 0}, "too many blocks for the emulator's shared memory");
  } else if (posix_memalign(&memory, 128, bytes ? bytes : 1) != 0) {
    fail({"launch", 0}, "no memory");
  }
  const uint32_t poison = 0x7fc0dead;
  for (size_t at = 0; at + 4 <= bytes; at += 4) memcpy(static_cast<char*>(memory) + at, &poison, 4);
  return static_cast<char*>(memory);
}

struct Device {
  const char* name;
  Limits limits;
  int shared_multiprocessor;
};
const Device& device() {
  static const Device devices[] = {
      {"sm_90", {9, 132, 227 * 1024}, 228 * 1024},
      {"sm_80", {8, 108, 163 * 1024}, 164 * 1024},
      {"tiny", {9, 4, 24 * 1024}, 25 * 1024},
      {"tiny_80", {8, 4, 24 * 1024}, 25 * 1024},
      {"small", {9, 4, 64 * 1024}, 65 * 1024},
  };
  const char* name = getenv("PK_DEVICE");
  for (const Device& one : devices)
    if (name == nullptr || std::string(name) == one.name) return one;
  fail({"PK_DEVICE", 0}, "'%s' is no device of the emulator", name);
}

}  // namespace

void fail(Place place, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fprintf(stderr, "EMULATOR %s:%d: %s", place.file, place.line, text);
  if (current != nullptr) fprintf(stderr, " (block %u, thread %d)", current->block.x, current->linear);
  fprintf(stderr, "\n");
  if (current == nullptr && scheduler.kernel != nullptr) {
    std::map<std::string, int> waiting;
    for (const auto& fiber : scheduler.pool)
      if (!fiber->done) ++waiting[std::string(fiber->waits.file) + ":" + std::to_string(fiber->waits.line)];
    for (const auto& [where, count] : waiting) fprintf(stderr, "  %d threads wait at %s\n", count, where.c_str());
  }
  fflush(stderr);
  _exit(66);
}

// ---- barriers -----------------------------------------------------------------------------------------------------------------

namespace {
template <class WakeAll> void meet(Barrier& barrier, size_t threads, size_t running, Place place, WakeAll&& wake_all) {
  char* order = &barrier.order[barrier.turn & 1];
  order_before(order);
  if (running < threads) fail(place, "a barrier after %zu threads have ended", threads - running);
  if (barrier.arrived > 0 && (barrier.place.line != place.line || strcmp(barrier.place.file, place.file) != 0))
    fail(place, "others wait at the barrier of %s:%d", barrier.place.file, barrier.place.line);
  barrier.place = place;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0, ++barrier.turn;
    wake_all();
  }
  park(place);
  order_after(order);
}
}  // namespace

void block_barrier(Place place) {
  Block& block = *scheduler.running->block;
  meet(block.barrier, block.fibers.size(), block.running, place, [&] {
    for (Fiber* fiber : block.fibers) wake(fiber);
  });
}
void cluster_barrier(Place place) {
  Cluster& cluster = *scheduler.running->block->cluster;
  meet(cluster.barrier, cluster.threads, cluster.running, place, [&] {
    for (const auto& block : cluster.blocks)
      for (Fiber* fiber : block->fibers) wake(fiber);
  });
}

void warp_gather(unsigned mask, const void* mine, size_t bytes, void* all, bool orders_memory, Place place) {
  Fiber* fiber = scheduler.running;
  Block& block = *fiber->block;
  const int lane = fiber->thread.lane, warp = fiber->thread.warp;
  if (!(mask >> lane & 1)) fail(place, "lane %d is not in its mask %08x", lane, mask);
  WarpCall* call = nullptr;
  for (WarpCall* one = &block.calls[2 * warp]; one < &block.calls[2 * warp] + 2; ++one)
    if (one->arrived != 0 && (one->mask & mask) != 0) call = one;
  if (call == nullptr) {
    call = &block.calls[2 * warp];
    if (call->arrived != 0) ++call;
    if (call->arrived != 0) fail(place, "a warp is split between more than two masks");
    call->mask = mask, call->bytes = bytes, call->place = place;
  }
  if (call->mask != mask || call->bytes != bytes || call->place.line != place.line || strcmp(call->place.file, place.file) != 0)
    fail(place, "lanes of mask %08x wait at %s:%d with mask %08x", mask, call->place.file, call->place.line, call->mask);
  if (bytes > sizeof call->brought[0]) fail(place, "%zu bytes a lane are too many", bytes);
  copy_bytes(call->brought[lane], mine, bytes), call->wanted[lane] = all;
  call->arrived |= 1u << lane;
  if (orders_memory) order_before(&call->order);
  if (call->arrived == mask) {
    for (int to = 0; to < LANES; ++to) {
      if (!(mask >> to & 1)) continue;
      for (int from = 0; from < LANES; ++from)
        if (mask >> from & 1) copy_bytes(static_cast<char*>(call->wanted[to]) + size_t(from) * bytes, call->brought[from], bytes);
      wake(block.fibers[size_t(warp) * LANES + to]);
    }
    call->arrived = 0;
  }
  park(place);
  if (orders_memory) order_after(&call->order);
}

void release(const void* counter) {
  scheduler.idle = 0;
  if (scheduler.with_tsan) __tsan_release(const_cast<void*>(counter));
}
void acquire(const void* counter) {
  if (scheduler.with_tsan) __tsan_acquire(const_cast<void*>(counter));
}
void wait_a_little() {
  if (++scheduler.idle > 1000 * (scheduler.live + 1)) fail({"relax", 0}, "blocks wait for each other for ever");
  enqueue(scheduler.running);
  park({"relax", 0});
}

// ---- shared memory and copies ---------------------------------------------------------------------------------------------------

void* static_shared(const void* key, size_t bytes) {
  Block& block = *scheduler.running->block;
  for (const Shared& one : block.shared)
    if (one.key == key) return one.memory;
  block.shared.push_back({key, new_shared(bytes), bytes});
  return block.shared.back().memory;
}
unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(scheduler.running->block->shared[0].memory); }
void* map_shared(void* pointer, unsigned rank) {
  Block& block = *scheduler.running->block;
  if (rank >= block.cluster->blocks.size()) fail({"cluster_map", 0}, "rank %u of %zu blocks", rank, block.cluster->blocks.size());
  const Block& target = *block.cluster->blocks[rank];
  if (target.running < target.fibers.size()) fail({"cluster_map", 0}, "block %u of the cluster may have ended", rank);
  char* const address = static_cast<char*>(pointer);
  for (size_t index = 0; index < block.shared.size(); ++index) {
    const Shared& one = block.shared[index];
    if (address < one.memory || address > one.memory + one.bytes) continue;
    for (Shared& other : block.cluster->blocks[rank]->shared)
      if (other.key == one.key) return other.memory + (address - one.memory);
    block.cluster->blocks[rank]->shared.push_back({one.key, new_shared(one.bytes), one.bytes});
    return block.cluster->blocks[rank]->shared.back().memory + (address - one.memory);
  }
  fail({"cluster_map", 0}, "not an address of shared memory");
}
unsigned cluster_rank() { return scheduler.running->block->rank; }

void copy_later(void* to, const void* from, size_t bytes) {
  Fiber* fiber = scheduler.running;
  fiber->copies.push_back({to, from, bytes, fiber->groups});
}
void commit_copies() { ++scheduler.running->groups; }
void wait_for_copies(int pending) {
  Fiber* fiber = scheduler.running;
  size_t kept = 0;
  for (const Copy& copy : fiber->copies) {
    if (copy.group >= fiber->groups - pending) {
      fiber->copies[kept++] = copy;
      continue;
    }
    if (scheduler.with_tsan)
      __tsan_read_range(const_cast<void*>(copy.from), copy.bytes), __tsan_write_range(copy.to, copy.bytes);
    copy_bytes(copy.to, copy.from, copy.bytes);
  }
  fiber->copies.resize(kept);
}

// ---- launches -----------------------------------------------------------------------------------------------------------------

namespace {
int resident_blocks(int threads, size_t shared_bytes) {
  return std::min({2048 / threads, int(device().shared_multiprocessor / (shared_bytes + 1024)), 32});
}
void prepare(Fiber* fiber, Block& block, const Launch& where, unsigned block_index, int linear) {
  const dim3 &grid = where.grid, &size = where.block;
  const unsigned t = unsigned(linear);
  fiber->block = &block, fiber->done = false, fiber->fake_stack = nullptr, fiber->waits = {"start", 0}, fiber->groups = 0;
  fiber->thread = {make_uint3(t % size.x, t / size.x % size.y, t / size.x / size.y),
                   make_uint3(block_index % grid.x, block_index / grid.x % grid.y, block_index / grid.x / grid.y),
                   size, grid, linear, linear % LANES, linear / LANES};
  if (scheduler.with_asan) __asan_unpoison_memory_region(fiber->stack, STACK);
  void** top = reinterpret_cast<void**>(fiber->stack + STACK);
  *--top = nullptr;  // a function starts with its return address on a stack aligned to 16 bytes
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber->top = top;
}

// Blocks that live at the same time: whole clusters.
void run_together(const Launch& where, const std::vector<unsigned>& clusters) {
  Scheduler& s = scheduler;
  const int threads = int(where.block.x * where.block.y * where.block.z);
  const size_t fibers = clusters.size() * where.cluster * size_t(threads);
  while (s.pool.size() < fibers) {
    auto fiber = std::make_unique<Fiber>();
    void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail({"launch", 0}, "no memory for %zu threads", fibers);
    fiber->stack = static_cast<char*>(stack), fiber->done = true;
    if (s.with_tsan) fiber->tsan = __tsan_create_fiber(0);
    s.pool.push_back(std::move(fiber));
  }
  std::vector<std::unique_ptr<Cluster>> groups;
  s.ready.assign(fibers, nullptr), s.first = s.waiting = 0, s.live = fibers, s.idle = 0;
  size_t used = 0;
  for (const unsigned cluster_index : clusters) {
    groups.push_back(std::make_unique<Cluster>());
    Cluster& cluster = *groups.back();
    cluster.threads = cluster.running = where.cluster * size_t(threads);
    for (unsigned rank = 0; rank < where.cluster; ++rank) {
      cluster.blocks.push_back(std::make_unique<Block>());
      Block& block = *cluster.blocks.back();
      block.rank = rank, block.running = size_t(threads), block.cluster = &cluster;
      block.calls.resize(2 * size_t(threads / LANES));
      block.shared.reserve(64);
      block.shared.push_back({nullptr, new_shared(where.shared_bytes), where.shared_bytes});
      for (int linear = 0; linear < threads; ++linear) {
        Fiber* fiber = s.pool[used++].get();
        prepare(fiber, block, where, cluster_index * where.cluster + rank, linear);
        block.fibers.push_back(fiber), enqueue(fiber);
      }
    }
  }
  while (s.waiting != 0) switch_to(nullptr, next_fiber());
  if (s.live != 0) fail({"launch", 0}, "%zu threads wait for ever", s.live);
  for (const auto& cluster : groups)
    for (const auto& block : cluster->blocks)
      for (const Shared& one : block->shared)
        if (!s.with_tsan) free(one.memory);
}
}  // namespace

void run(const Launch& where, const std::function<void()>& kernel) {
  Scheduler& s = scheduler;
  const Device& on = device();
  const Place place{"launch", 0};
  const unsigned threads = where.block.x * where.block.y * where.block.z, blocks = where.grid.x * where.grid.y * where.grid.z;
  if (threads < 1 || threads > 1024 || threads % LANES != 0) fail(place, "%u threads a block", threads);
  if (blocks < 1 || where.grid.y > 65535 || where.grid.z > 65535) fail(place, "a grid of %u blocks", blocks);
  if (where.shared_bytes > size_t(on.limits.shared_block)) fail(place, "%zu bytes of shared memory on %s", where.shared_bytes, on.name);
  if (where.cluster < 1 || where.cluster > 16 || blocks % where.cluster != 0) fail(place, "%u blocks in clusters of %u", blocks, where.cluster);
  if (where.cluster > 1 && on.limits.compute_major < 9) fail(place, "clusters on %s", on.name);
  if (where.cooperative && blocks > unsigned(resident_blocks(int(threads), where.shared_bytes) * on.limits.multiprocessors))
    fail(place, "a cooperative grid of %u blocks does not fit", blocks);
  const char* seed = getenv("PK_SEED");
  s.shuffle = seed != nullptr && *seed != 0;
  if (s.shuffle) s.random.seed(strtoull(seed, nullptr, 10));
  s.with_tsan = __tsan_create_fiber != nullptr;
  s.with_asan = !s.with_tsan && __sanitizer_start_switch_fiber != nullptr;
  s.kernel = &kernel;
  if (s.with_tsan) {
    s.tsan = __tsan_get_current_fiber();
    if (s.arena != nullptr) munmap(s.arena, s.arena_bytes);
    s.arena_bytes = size_t(blocks) * (where.shared_bytes + 65536);
    s.arena = s.arena_next = static_cast<char*>(
        mmap(nullptr, s.arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  order_before(&s.begin);
  std::vector<unsigned> order(blocks / where.cluster);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  if (s.shuffle) std::shuffle(order.begin(), order.end(), s.random);
  if (where.cooperative) {
    run_together(where, order);
  } else {
    for (const unsigned one : order) run_together(where, {one});
  }
  order_after(&s.end);
  s.kernel = nullptr;
}

}  // namespace emulator

cudaError_t limits_of(int, Limits& limits) {
  limits = emulator::device().limits;
  return cudaSuccess;
}
cudaError_t clear(void* pointer, size_t bytes, uintptr_t) {
  memset(pointer, 0, bytes);
  return cudaSuccess;
}

}  // namespace pk
