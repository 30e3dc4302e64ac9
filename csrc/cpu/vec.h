// Vectors of float or double at the width of one instruction set, with exp and log. GCC and Clang vector extensions only.
//
// This header is compiled once per instruction set. Everything here is in an unnamed namespace and nothing from the
// standard library is instantiated, so that the linker can never mix code of two instruction sets.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef PK_VECTOR_BYTES
#define PK_VECTOR_BYTES 16
#endif

namespace {

template <class T> struct Traits;

template <> struct Traits<float> {
  typedef float V __attribute__((vector_size(PK_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(PK_VECTOR_BYTES)));
  typedef float U __attribute__((vector_size(PK_VECTOR_BYTES), aligned(4), may_alias));
  static constexpr float EXP_LOW = -88.02f, EXP_HIGH = 88.0f;  // EXP_LOW: -127 ln 2, whose power of two is 0
  static constexpr float MAGIC = 12582912.0f;                              // 1.5 * 2^23: rounds to an integer when added
  static constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;  // ln 2 in two parts, the first exact
  static constexpr int MANTISSA = 23, BIAS = 127, EXP_TERMS = 6, LOG_TERMS = 5;
  // Polynomial of exp on [-ln 2 / 2, ln 2 / 2] with the least relative error, 2e-9.
  static constexpr float EXP[] = {1.0f, 1.0f, 0.49999994f, 0.1666643f, 0.04166801f, 0.008374255f, 0.0013843538f};
  static constexpr int32_t MAGIC_BITS = 0x4b400000, HALF_ROOT_BITS = 0x3f3504f3;  // bits of MAGIC and of sqrt(1/2)
  // Logs of scalings outside [SCALING_LOW, SCALING_HIGH] are absorbed into the potentials. A sum over kernel times scaling
  // is then right to rounding even where the kernel underflows: 1e-38 * exp(24) is nothing beside a sum of SUM_LOW.
  static constexpr float SCALING_LOW = -48.0f, SCALING_HIGH = 24.0f, SUM_LOW = 1e-18f, SUM_HIGH = 1e10f;
  static constexpr double RESIDUAL_FLOOR = 1e-6;  // residuals below it are mostly rounding
  static constexpr int GRID_BITS = 22;  // potentials are kept as multiples of 2^-22 of their range: sums of two are exact
};

template <> struct Traits<double> {
  typedef double V __attribute__((vector_size(PK_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(PK_VECTOR_BYTES)));
  typedef double U __attribute__((vector_size(PK_VECTOR_BYTES), aligned(8), may_alias));
  static constexpr double EXP_LOW = -709.08, EXP_HIGH = 709.0;
  static constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double LN2_HIGH = 6.93147180369123816490e-01, LN2_LOW = 1.90821492927058770002e-10;
  static constexpr int MANTISSA = 52, BIAS = 1023, EXP_TERMS = 13, LOG_TERMS = 11;
  static constexpr double EXP[] = {1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
                                   1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600,
                                   1.0 / 6227020800};
  static constexpr int64_t MAGIC_BITS = 0x4338000000000000, HALF_ROOT_BITS = 0x3fe6a09e667f3bcd;
  static constexpr double SCALING_LOW = -400.0, SCALING_HIGH = 150.0, SUM_LOW = 1e-180, SUM_HIGH = 1e100;
  static constexpr double RESIDUAL_FLOOR = 1e-14;
  static constexpr int GRID_BITS = 50;
};

template <class T> using Vec = typename Traits<T>::V;
template <class T> using Int = typename Traits<T>::I;
template <class T> constexpr int LANES = PK_VECTOR_BYTES / sizeof(T);
constexpr int PANEL_VECTORS = 4;
template <class T> constexpr int PANEL = PANEL_VECTORS * LANES<T>;  // columns that one pass over the rows works on

template <class T> inline Vec<T> splat(T x) { return x - Vec<T>{}; }
template <class T> inline Vec<T> load(const T* p) { return *reinterpret_cast<const Vec<T>*>(p); }
template <class T> inline void store(T* p, Vec<T> v) { *reinterpret_cast<Vec<T>*>(p) = v; }
template <class T> inline Vec<T> load_any(const T* p) { return *reinterpret_cast<const typename Traits<T>::U*>(p); }
template <class T> inline void store_any(T* p, Vec<T> v) { *reinterpret_cast<typename Traits<T>::U*>(p) = v; }

template <class T> inline Vec<T> select(Int<T> mask, Vec<T> yes, Vec<T> no) {
  return (Vec<T>)((mask & (Int<T>)yes) | (~mask & (Int<T>)no));
}
template <class T> inline Vec<T> vmax(Vec<T> x, Vec<T> y) { return x > y ? x : y; }
template <class T> inline Vec<T> vmin(Vec<T> x, Vec<T> y) { return x < y ? x : y; }
// LANES<double> numbers of type T as doubles, and back.
template <class T> struct Part {
  typedef T Type __attribute__((vector_size(PK_VECTOR_BYTES / sizeof(double) * sizeof(T)), aligned(4), may_alias));
};
template <class T> inline Vec<double> load_wide(const T* p) {
  return __builtin_convertvector(*reinterpret_cast<const typename Part<T>::Type*>(p), Vec<double>);
}
template <class T> inline void store_narrow(T* p, Vec<double> v) {
  typedef typename Part<T>::Type Narrow;
  *reinterpret_cast<Narrow*>(p) = __builtin_convertvector(v, Narrow);
}

// Keeps a vector in its register, where GCC would load it again each time, and hides where it comes from.
template <class V> inline void hold(V& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  if constexpr (sizeof(V) <= 32) asm("" : "+x"(v));  // wider ones are emulated by two registers
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  (void)v;
#endif
}
// A constant that GCC cannot see through: with one that it sees, a maximum becomes two instructions instead of one.
template <class T> inline Vec<T> opaque(T x) {
  Vec<T> v = splat<T>(x);
  hold(v);
  return v;
}
template <class T> inline Vec<T> vabs(Vec<T> x) { return vmax<T>(x, -x); }

template <class T> inline T sum_lanes(Vec<T> v) {
  T total = v[0];
  for (int k = 1; k < LANES<T>; ++k) total += v[k];
  return total;
}

template <int... K> struct Indices {};
template <int N, int... K> struct Count : Count<N - 1, N - 1, K...> {};
template <int... K> struct Count<0, K...> { using Type = Indices<K...>; };

// Sums of neighbours: x0 + x1, x2 + x3, ..., y0 + y1, y2 + y3, ...
template <class T, int... K> inline Vec<T> sum_pairs(Vec<T> x, Vec<T> y, Indices<K...>) {
#ifdef __clang__
  return __builtin_shufflevector(x, y, 2 * K...) + __builtin_shufflevector(x, y, (2 * K + 1)...);
#else
  return __builtin_shuffle(x, y, Int<T>{2 * K...}) + __builtin_shuffle(x, y, Int<T>{2 * K + 1 ...});
#endif
}
// The lane sums of LANES vectors, in their order.
template <class T> inline Vec<T> sum_each(const T* vectors) {
  Vec<T> v[LANES<T>];
#pragma GCC unroll 16
  for (int k = 0; k < LANES<T>; ++k) v[k] = load<T>(vectors + k * LANES<T>);
#pragma GCC unroll 16
  for (int count = LANES<T> / 2; count >= 1; count /= 2)
#pragma GCC unroll 16
    for (int k = 0; k < count; ++k) v[k] = sum_pairs<T>(v[2 * k], v[2 * k + 1], typename Count<LANES<T>>::Type{});
  return v[0];
}

template <class T> inline T max_lanes(Vec<T> v) {
  T top = v[0];
  for (int k = 1; k < LANES<T>; ++k) top = v[k] > top ? v[k] : top;
  return top;
}
template <class T> inline T min_lanes(Vec<T> v) {
  T low = v[0];
  for (int k = 1; k < LANES<T>; ++k) low = v[k] < low ? v[k] : low;
  return low;
}

// exp: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial of r times 2^n. 0 below about EXP_LOW (-inf included).
template <class T> inline Vec<T> vexp(Vec<T> x) {
  using R = Traits<T>;
  x = vmin<T>(vmax<T>(x, opaque<T>(R::EXP_LOW)), opaque<T>(R::EXP_HIGH));
  const Vec<T> magic = splat<T>(R::MAGIC + T(R::BIAS));  // the low bits of the sum are the exponent of 2^n
  const Vec<T> shifted = x * splat<T>(T(1.4426950408889634)) + magic, n = shifted - magic;
  const Vec<T> r = (x - n * splat<T>(R::LN2_HIGH)) - n * splat<T>(R::LN2_LOW);
  Vec<T> p = splat<T>(R::EXP[R::EXP_TERMS]);
#pragma GCC unroll 16
  for (int k = R::EXP_TERMS - 1; k >= 0; --k) p = p * r + splat<T>(R::EXP[k]);
  return p * (Vec<T>)((Int<T>)shifted << R::MANTISSA);
}

// log of positive normal numbers: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m - 1) / (m + 1)).
template <class T> inline Vec<T> vlog(Vec<T> x) {
  using R = Traits<T>;
  const Int<T> bits = (Int<T>)x;
  const Int<T> e = (bits - R::HALF_ROOT_BITS) >> R::MANTISSA;
  const Vec<T> m = (Vec<T>)(bits - (e << R::MANTISSA));
  const Vec<T> exponent = (Vec<T>)(e + R::MAGIC_BITS) - splat<T>(R::MAGIC);
  const Vec<T> z = (m - splat<T>(T(1))) / (m + splat<T>(T(1)));
  const Vec<T> z2 = z * z;
  Vec<T> p = splat<T>(T(1) / T(2 * R::LOG_TERMS + 1));
#pragma GCC unroll 16
  for (int k = R::LOG_TERMS - 1; k >= 0; --k) p = p * z2 + splat<T>(T(1) / T(2 * k + 1));
  return (z + z) * p + exponent * splat<T>(R::LN2_LOW) + exponent * splat<T>(R::LN2_HIGH);
}

}  // namespace
