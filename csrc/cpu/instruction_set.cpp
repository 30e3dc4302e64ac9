// Chooses the instruction set at run time. Compiled for the baseline of the platform.
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"

namespace pk {

#define PK_DECLARE(isa) const CpuKernels& cpu_kernels_##isa();
PK_DECLARE(baseline)
#ifdef PK_HAVE_WIDE
PK_DECLARE(wide)
#endif
#ifdef PK_HAVE_AVX2
PK_DECLARE(avx2)
#endif
#ifdef PK_HAVE_AVX512
PK_DECLARE(avx512)
#endif

namespace {

std::vector<const CpuKernels*> runnable() {
  std::vector<const CpuKernels*> found{&cpu_kernels_baseline()};
#ifdef PK_HAVE_WIDE
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&cpu_kernels_wide());
#endif
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

}  // namespace

const CpuKernels& cpu_kernels() {
  const CpuKernels* now = chosen.load();
  if (now == nullptr) {
    now = runnable().back();
    chosen.store(now);
  }
  return *now;
}

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

const char* cpu_in_use() { return cpu_kernels().name; }

}  // namespace pk
