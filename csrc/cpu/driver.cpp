// Spreads problems over threads and chooses the instruction set. Compiled for the baseline of the platform.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../api.h"

namespace pk {

#define PK_DECLARE(isa) const CpuKernels& cpu_kernels_##isa();
PK_DECLARE(baseline)
#ifdef PK_HAVE_AVX2
PK_DECLARE(avx2)
#endif
#ifdef PK_HAVE_AVX512
PK_DECLARE(avx512)
#endif

namespace {

std::vector<const CpuKernels*> runnable() {
  std::vector<const CpuKernels*> found{&cpu_kernels_baseline()};
#ifdef PK_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&cpu_kernels_avx2());
#endif
#ifdef PK_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma"))
    found.push_back(&cpu_kernels_avx512());
#endif
  return found;
}

std::atomic<const CpuKernels*> chosen{nullptr};

const CpuKernels& kernels() {
  const CpuKernels* now = chosen.load();
  if (now == nullptr) {
    now = runnable().back();
    chosen.store(now);
  }
  return *now;
}

// Scratch memory of one worker; large pieces ask for huge pages, which halves the time of problems beyond the cache.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    if (bytes == 0) return;
    const size_t page = size_t(1) << 21, align = bytes >= page ? page : 64;
    bytes = (bytes + align - 1) / align * align;
    memory_ = static_cast<char*>(std::aligned_alloc(align, bytes));
    if (memory_ == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (align == page) madvise(memory_, bytes, MADV_HUGEPAGE);
#endif
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return memory_; }

 private:
  char* memory_ = nullptr;
};

// Run work(index, scratch) for every index. Each index is computed by one thread alone, so results do not depend on how
// many there are.
template <class Work> void spread(int64_t count, int threads, size_t scratch_bytes, const Work& work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  auto run = [&] {
    try {
      Scratch scratch(scratch_bytes);
      for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) work(i, scratch.data());
    } catch (...) {
      std::lock_guard<std::mutex> lock(guard);
      failure = std::current_exception();
      next.store(count);
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t t = 1; t < threads && t < count; ++t) helpers.emplace_back(run);
  } catch (const std::exception&) {
    // The system gives no more threads or memory: those that started, and this one, do the work.
  }
  run();
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

const char* cpu_instruction_sets() {
  static const std::string names = [] {
    std::string text;
    for (const CpuKernels* set : runnable()) text += (text.empty() ? "" : " ") + std::string(set->name);
    return text;
  }();
  return names.c_str();
}

const char* cpu_use(const char* name) {
  const auto sets = runnable();
  const CpuKernels* found = name == nullptr ? sets.back() : nullptr;
  for (const CpuKernels* set : sets)
    if (name != nullptr && std::strcmp(set->name, name) == 0) found = set;
  if (found == nullptr) return nullptr;
  chosen.store(found);
  return found->name;
}

const char* cpu_in_use() { return kernels().name; }

template <class T> void cpu_sinkhorn(const SinkhornTask<T>& task, int threads) {
  const CpuKernels& set = kernels();
  const size_t bytes = set.sinkhorn_scratch(task.rows, task.cols, sizeof(T), task.anderson);
  spread(task.problems, threads, bytes, [&](int64_t p, char* scratch) {
    if constexpr (sizeof(T) == 4) set.sinkhorn_f32(task, p, scratch);
    else set.sinkhorn_f64(task, p, scratch);
  });
}
template <class T> void cpu_token_cost(const CostTask<T>& task, int threads) {
  const CpuKernels& set = kernels();
  spread(task.samples * task.heads, threads, 0, [&](int64_t head, char*) {
    if constexpr (sizeof(T) == 4) set.token_cost_f32(task, head);
    else set.token_cost_f64(task, head);
  });
}
template <class T> void cpu_transport_attention(const AttentionTask<T>& task, int threads) {
  const CpuKernels& set = kernels();
  const CostTask<T>& shape = task.cost;
  spread(shape.samples * shape.heads, threads, set.sinkhorn_scratch(shape.rows, shape.cols, sizeof(T), false),
         [&](int64_t head, char* scratch) {
           if constexpr (sizeof(T) == 4) set.attention_f32(task, head, scratch);
           else set.attention_f64(task, head, scratch);
         });
}

template void cpu_sinkhorn<float>(const SinkhornTask<float>&, int);
template void cpu_sinkhorn<double>(const SinkhornTask<double>&, int);
template void cpu_token_cost<float>(const CostTask<float>&, int);
template void cpu_token_cost<double>(const CostTask<double>&, int);
template void cpu_transport_attention<float>(const AttentionTask<float>&, int);
template void cpu_transport_attention<double>(const AttentionTask<double>&, int);

}  // namespace pk
