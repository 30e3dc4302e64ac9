// Limits of one core: multiply-add rate, exponentials, and how fast each level of memory delivers loads. Prints JSON.
// Vectors are as wide as the compiler's target allows (-march=native).
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int Int __attribute__((vector_size(4 * kLanes)));

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

Vec all(float value) { return value - Vec{}; }

// 2^x by a polynomial of degree 5 on [-1/2, 1/2] and an exponent field; relative error below 3e-6, which a kernel must
// not undercut: this is the cheapest exponential that is worth comparing with.
Vec exp2_of(Vec x) {
  const Vec shifted = x + 12582912.0f;
  const Vec f = x - (shifted - 12582912.0f);
  Vec p = all(1.3333558e-3f);
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return (Vec)((Int)p + ((Int)shifted << 23));
}

// Make the compiler believe that the sums are used. The array itself stays in registers.
template <size_t n>
void keep(const Vec (&sums)[n]) {
  Vec total = sums[0];
#pragma GCC unroll 16
  for (size_t k = 1; k < n; ++k) total += sums[k];
  asm volatile("" ::"m"(total));
}

template <class Work>
double best_seconds(int repeats, Work work) {
  double best = 1e30;
  for (int r = 0; r < repeats; ++r) {
    const double start = now();
    work();
    best = std::min(best, now() - start);
  }
  return best;
}

double fma_rate() {
  constexpr int kChains = 12;
  constexpr long kSteps = 4000000;
  const double seconds = best_seconds(7, [] {
    Vec sum[kChains];  // in registers
#pragma GCC unroll 12
    for (int k = 0; k < kChains; ++k) sum[k] = all(1.0f + k);
    const Vec factor = all(0.999f), term = all(1e-3f);
    for (long i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
      for (int k = 0; k < kChains; ++k) {
        sum[k] = sum[k] * factor + term;
      }
    }
    keep(sum);
  });
  return 2.0 * kChains * kLanes * kSteps / seconds;
}

double exp_rate() {
  constexpr int kSize = 2048, kPasses = 4000;
  alignas(64) static float x[kSize], y[kSize];
  for (int i = 0; i < kSize; ++i) x[i] = -0.01f * i;
  const double seconds = best_seconds(7, [&] {
    for (int pass = 0; pass < kPasses; ++pass) {
      for (int i = 0; i < kSize; i += 4 * kLanes) {
        Vec v[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          memcpy(&v[k], x + i + k * kLanes, sizeof(Vec));
          v[k] = exp2_of(v[k]);
          memcpy(y + i + k * kLanes, &v[k], sizeof(Vec));
        }
      }
      asm volatile("" ::"r"(y) : "memory");
    }
  });
  return double(kSize) * kPasses / seconds;
}

double load_rate(size_t bytes) {
  const size_t page = size_t{1} << 21, n = bytes / sizeof(float) / (8 * kLanes) * (8 * kLanes);
  float* data = static_cast<float*>(aligned_alloc(page, (bytes + page - 1) / page * page));
  std::fill(data, data + n, 1.0f);
  const int passes = std::max<size_t>(2, (size_t{256} << 20) / bytes);
  const double seconds = best_seconds(5, [&] {
    for (int pass = 0; pass < passes; ++pass) {
      Vec sum[8] = {};
      for (size_t i = 0; i < n; i += 8 * kLanes) {
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
          Vec v;
          memcpy(&v, data + i + k * kLanes, sizeof v);
          sum[k] += v;
        }
      }
      keep(sum);
    }
  });
  free(data);
  return double(n) * sizeof(float) * passes / seconds;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  printf("{\"flops\": %.6g, \"exps\": %.6g, \"loads\": {", fma_rate(), exp_rate());
  const char* names[] = {"L1", "L2", "L3", "RAM"};
  for (int k = 0; k < 4; ++k) {
    printf("%s\"%s\": %.6g", k ? ", " : "", names[k], load_rate(strtoull(argv[k + 1], nullptr, 10)));
  }
  printf("}}\n");
}
