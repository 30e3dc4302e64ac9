// What the tests of the emulated kernels share: random problems, workspaces full of NaN, checks that print a line.
//
// Programs take a seed as their only argument; without one it is new every time. They exit with 1 if a check fails.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/api.h"

namespace pk {
namespace test {

inline int failures = 0;

inline void check(bool passed, const std::string& what, double value = 0) {
  std::printf("%s %s (%.3g)\n", passed ? "ok  " : "FAIL", what.c_str(), value);
  std::fflush(stdout);
  if (!passed) ++failures;
}

// Largest difference of two arrays; NaN differs from everything but NaN.
template <class A, class B> double difference(const std::vector<A>& x, const std::vector<B>& y) {
  double largest = x.size() == y.size() ? 0.0 : INFINITY;
  for (size_t i = 0; i < x.size() && i < y.size(); ++i) {
    if (std::isnan(double(x[i])) && std::isnan(double(y[i]))) continue;
    const double away = std::abs(double(x[i]) - double(y[i]));
    if (!(away <= largest)) largest = std::isnan(away) ? INFINITY : away;
  }
  return largest;
}

// Largest difference in units of the largest value.
template <class A, class B> double relative(const std::vector<A>& x, const std::vector<B>& y) {
  double most = 1e-30;
  for (const B& value : y) most = std::max(most, std::abs(double(value)));
  return difference(x, y) / most;
}

struct Random {
  std::mt19937_64 engine;
  explicit Random(uint64_t seed) : engine(seed) {}
  double uniform() { return double(engine() >> 11) / 9007199254740992.0; }
  int64_t below(int64_t count) { return int64_t(engine() % uint64_t(count)); }
  template <class T> std::vector<T> uniform(int64_t count, double low = 0, double high = 1) {
    std::vector<T> values(static_cast<size_t>(count));
    for (T& x : values) x = T(float(low + (high - low) * uniform()));
    return values;
  }
};
inline uint64_t seed_of(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

// Values as a storage holds them; in 16 bits; and back.
inline float rounded(float x, Storage storage) {
  if (storage == Storage::bfloat16) return __bfloat162float(__float2bfloat16_rn(x));
  return storage == Storage::float16 ? __half2float(__float2half_rn(x)) : x;
}
inline std::vector<float> rounded(std::vector<float> values, Storage storage) {
  for (float& x : values) x = rounded(x, storage);
  return values;
}
inline std::vector<uint16_t> packed(const std::vector<float>& values, Storage storage) {
  std::vector<uint16_t> out;
  for (float x : values) {
    const __nv_bfloat16 b = __float2bfloat16_rn(x);
    const __half h = __float2half_rn(x);
    uint16_t bits;
    memcpy(&bits, storage == Storage::bfloat16 ? static_cast<const void*>(&b) : static_cast<const void*>(&h), 2);
    out.push_back(bits);
  }
  return out;
}
inline std::vector<float> unpacked(const std::vector<uint16_t>& values, Storage storage) {
  std::vector<float> out;
  for (uint16_t bits : values) {
    __nv_bfloat16 b;
    __half h;
    memcpy(static_cast<void*>(&b), &bits, 2), memcpy(static_cast<void*>(&h), &bits, 2);
    out.push_back(storage == Storage::bfloat16 ? __bfloat162float(b) : __half2float(h));
  }
  return out;
}

// Memory of exactly so many bytes, aligned as the launchers want it, that starts as NaN.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    if (bytes == 0) return;
    if (posix_memalign(&memory_, 256, bytes) != 0) std::abort();
    for (size_t i = 0; i + 4 <= bytes; i += 4) static_cast<uint32_t*>(memory_)[i / 4] = 0x7fc0dead;
  }
  ~Workspace() { std::free(memory_); }
  Workspace(const Workspace&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_ = nullptr;
};

inline std::vector<float> nans(int64_t count) { return std::vector<float>(size_t(count), NAN); }
inline std::vector<double> widened(const std::vector<float>& x) { return {x.begin(), x.end()}; }

}  // namespace test
}  // namespace pk
