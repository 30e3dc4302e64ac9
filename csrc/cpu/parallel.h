// Threads and their scratch memory. Compiled for the baseline of the platform.
#pragma once
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace pk {

// Scratch memory of one worker; large pieces ask for huge pages, which halves the time of problems beyond the cache.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    if (bytes == 0) return;
    const size_t page = size_t(1) << 21, align = bytes >= page ? page : 64;
    bytes = (bytes + align - 1) / align * align;
    memory_ = static_cast<char*>(std::aligned_alloc(align, bytes));
    if (memory_ == nullptr) throw std::bad_alloc();
#ifdef PK_POISON_SCRATCH
    std::memset(memory_, 0xff, bytes);  // NaN: what reads memory that nothing was written to shows
#endif
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

// A team for the length of one call: threads that wait for chunks, the calling one, its leader, among them.
class Crew : public Team {
 public:
  Crew() : Team{&Crew::run_chunks} {}
  // For the leader: let the helpers go. For a helper: take chunks until then.
  void close() { ticket_.store(CLOSED, std::memory_order_release); }
  void help() {
    uint64_t seen = 0;  // the last job that had no chunk left
    for (int spins = 0;; ++spins) {
      const uint64_t ticket = ticket_.load(std::memory_order_acquire);
      if (ticket == CLOSED) return;
      const uint64_t job = ticket & ~(JOB - 1);
      if (job == seen || job == 0) {
        wait(spins);
        continue;
      }
      take_chunks(job);
      seen = job, spins = 0;
    }
  }
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

 private:
  using Work = void (*)(void*, int64_t);
  // The ticket holds the number of the job and the next chunk of it, so that a late thread cannot take a chunk of a job
  // that it has not read.
  static constexpr uint64_t JOB = uint64_t(1) << 32, CLOSED = ~uint64_t(0);
  static constexpr int SPINS = 4096;  // about 40 us; then the processor goes to whoever wants it

  static void run_chunks(Team* self, Work work, void* context, int64_t chunks) {
    static_cast<Crew*>(self)->run_job(work, context, chunks);
  }
  void run_job(Work work, void* context, int64_t chunks) {
    // Closed while it is described: a late thread that already reads the new description finds no chunk of the old job.
    ticket_.store(0, std::memory_order_release);
    work_.store(work, std::memory_order_release), context_.store(context, std::memory_order_release);
    chunks_.store(chunks, std::memory_order_release), done_.store(0, std::memory_order_release);
    job_ += JOB;
    ticket_.store(job_, std::memory_order_release);
    take_chunks(job_);
    for (int spins = 0; done_.load(std::memory_order_acquire) < chunks; ++spins) wait(spins);
  }
  // Take chunks of one job until none is left.
  void take_chunks(uint64_t job) {
    const Work work = work_.load(std::memory_order_acquire);
    void* context = context_.load(std::memory_order_acquire);
    const uint64_t end = job + uint64_t(chunks_.load(std::memory_order_acquire));
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (ticket >= job && ticket < end) {
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      work(context, int64_t(ticket - job));
      done_.fetch_add(1, std::memory_order_acq_rel);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }
  static void wait(int spins) {
    if (spins >= SPINS) {
      std::this_thread::yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  uint64_t job_ = 0;
  std::atomic<Work> work_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> chunks_{0};
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

// The entry of the OpenMP run-time that this process has loaded already, PyTorch's as a rule; null if there is none. Its
// threads wait for work by spinning for some milliseconds: threads of our own would share the processors with them.
using OpenMpParallel = void (*)(void (*work)(void*), void* context, unsigned threads, unsigned flags);
inline OpenMpParallel open_mp() {
#if defined(__linux__)
  static const auto entry = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  // The threads of the run-time do not survive a fork, and it would wait for them.
  static const pid_t process = getpid();
  return getpid() == process ? entry : nullptr;
#else
  return nullptr;
#endif
}

// body(crew) on this thread, with a crew of that many threads. Fewer come where the system or OpenMP gives no more; those
// that are there do the work. What body throws is thrown here.
template <class Body> void with_crew(int threads, const Body& body) {
  struct Call {
    explicit Call(const Body& b) : body(b) {}
    const Body& body;
    Crew crew;
    std::thread::id leader = std::this_thread::get_id();
    std::exception_ptr failure;
    void lead() {
      try {
        body(crew);
      } catch (...) {
        failure = std::current_exception();
      }
      crew.close();
    }
  } call(body);
  if (const OpenMpParallel parallel = open_mp()) {
    const auto member = [](void* context) {
      Call& own = *static_cast<Call*>(context);
      if (std::this_thread::get_id() == own.leader) own.lead();
      else own.crew.help();
    };
    parallel(member, &call, unsigned(threads), 0);
  } else {
    std::vector<std::thread> helpers;
    try {
      for (int t = 1; t < threads; ++t) helpers.emplace_back([&call] { call.crew.help(); });
    } catch (const std::exception&) {  // no more threads or memory
    }
    call.lead();
    for (std::thread& helper : helpers) helper.join();
  }
  if (call.failure) std::rethrow_exception(call.failure);
}

// Run work(index, scratch, team) for every index: many problems one to a thread (team null), and, if one can be `split`, the
// few that are left over one after the other, each by all threads together.
template <class Work> void spread(int64_t count, int threads, size_t scratch_bytes, bool split, const Work& work) {
  if (!split && threads > count) threads = int(count);
  if (threads <= 1) {
    Scratch scratch(scratch_bytes);
    for (int64_t i = 0; i < count; ++i) work(i, scratch.data(), static_cast<Team*>(nullptr));
    return;
  }
  with_crew(threads, [&](Crew& crew) {
    const int64_t alone = split ? count - count % threads : count;
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex guard;
    auto worker = [&] {
      try {
        Scratch scratch(scratch_bytes);
        for (int64_t i = next.fetch_add(1); i < alone; i = next.fetch_add(1)) work(i, scratch.data(), static_cast<Team*>(nullptr));
      } catch (...) {
        std::lock_guard<std::mutex> lock(guard);
        failure = std::current_exception();
        next.store(alone);
      }
    };
    if (alone > 0)
      crew.run(&crew, [](void* context, int64_t) { (*static_cast<decltype(worker)*>(context))(); }, &worker, threads);
    if (failure) std::rethrow_exception(failure);
    if (alone == count) return;
    Scratch scratch(scratch_bytes);
    for (int64_t i = alone; i < count; ++i) work(i, scratch.data(), static_cast<Team*>(&crew));
  });
}

}  // namespace pk
