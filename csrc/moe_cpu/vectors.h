// Vectors whose lanes are rows of a block. Only for the files compiled once for each instruction set, so all
// of it is static: the linker must never keep one variant's copy of a function for all of them.
#pragma once

#include <cstdint>

#ifdef GEMQ_X86
#include <immintrin.h>
#endif

#include "gemq/layouts.h"

namespace gemq {
namespace {

#define GEMQ_INLINE static inline __attribute__((always_inline))

// A register of the target holds all 16 rows of a block, or a half or a quarter of them, and then the block
// is worked on in that many parts; wider vectors than the target's make GCC spill.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kRows = kCpuRows;
static_assert(kRows % kLanes == 0, "a block is whole registers");
constexpr int kMaxGroup = 128;
using Float = float __attribute__((vector_size(4 * kLanes)));
using Int = int32_t __attribute__((vector_size(4 * kLanes)));
using Word = uint32_t __attribute__((vector_size(4 * kLanes)));

// How far ahead of the codes in use memory is asked for, in bytes. The hardware's own prefetching stops at
// the ends of pages; two cores with this reach the rate of a plain read, and 60 to 75% of it without.
constexpr int kAhead = 6144;
constexpr int kMetaAhead = 2048;

GEMQ_INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 3); }

template <class V, class T>
GEMQ_INLINE V load(const T* at) {
  V value;
  __builtin_memcpy(&value, at, sizeof value);
  return value;
}

template <class V, class T>
GEMQ_INLINE void store(T* at, V value) {
  __builtin_memcpy(at, &value, sizeof value);
}

GEMQ_INLINE Float broadcast(float value) { return value - Float{}; }

GEMQ_INLINE Float load_half(const uint16_t* at) {
#if defined(__AVX512F__)
  return (Float)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#elif defined(__F16C__)
  return (Float)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#else
  return Float{half_to_float(at[0]), half_to_float(at[1]), half_to_float(at[2]), half_to_float(at[3])};
#endif
}

// e^v to a few units in the last place: 2^n * e^r with r in [-ln(2) / 2, ln(2) / 2]. NaN stays NaN.
GEMQ_INLINE Float exp_float(Float v) {
  v = v > 88.0f ? broadcast(88.0f) : v;
  v = v < -87.0f ? broadcast(-87.0f) : v;
  const Float shifted = v * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const Float n = shifted - 12582912.0f;
  const Float r = (v - n * 0.693145752f) - n * 1.42860677e-6f;  // ln(2) in two parts, n * the first is exact
  Float p = r * 1.9841270e-4f + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Int exponent = ((Int)shifted - 0x4b400000 + 127) << 23;
  return p * (Float)exponent;
}

GEMQ_INLINE float total(Float v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}

template <int P>
struct Constant {
  static constexpr int value = P;
};

// Calls f(plane width as a constant, bit of the code that it starts at, its bytes) for each plane of a group.
template <class F>
GEMQ_INLINE void for_each_plane(int bits, int group, const uint8_t* codes, F&& f) {
  if (bits == 8) return f(Constant<8>(), 0, codes);
  if (bits & 4) f(Constant<4>(), 0, codes);
  if (bits & 2) f(Constant<2>(), bits & 4, codes + 2 * group * (bits & 4));
  if (bits & 1) f(Constant<1>(), bits & 6, codes + 2 * group * (bits & 6));
}

// Calls f(how many as a constant, first) for runs of kMost and one shorter run that make up [0, count).
template <int kMost, class F>
GEMQ_INLINE void in_runs(int count, F&& f) {
  int first = 0;
  for (; first + kMost <= count; first += kMost) f(Constant<kMost>(), first);
  switch (count - first) {
    case 7:
      if constexpr (kMost > 7) f(Constant<7>(), first);
      return;
    case 6:
      if constexpr (kMost > 6) f(Constant<6>(), first);
      return;
    case 5:
      if constexpr (kMost > 5) f(Constant<5>(), first);
      return;
    case 4:
      if constexpr (kMost > 4) f(Constant<4>(), first);
      return;
    case 3:
      if constexpr (kMost > 3) f(Constant<3>(), first);
      return;
    case 2:
      if constexpr (kMost > 2) f(Constant<2>(), first);
      return;
    case 1:
      f(Constant<1>(), first);
      return;
    default:
      return;
  }
}

}  // namespace
}  // namespace gemq
