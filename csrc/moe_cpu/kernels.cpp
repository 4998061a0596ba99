// Compiled once for each instruction set, with GEMQ_VARIANT its namespace. Nothing here may have external
// linkage but the table at the end (no std:: templates either): the linker would keep one copy of an inline
// function, perhaps one with instructions that the running CPU lacks.
#include "moe_cpu/kernels.h"

#ifdef GEMQ_X86
#include <immintrin.h>
#endif

#include "gemq/half.h"

namespace gemq {
namespace {

#define GEMQ_INLINE static inline __attribute__((always_inline))

// A lane is a row. A register of the target holds all 16 rows of a block, or a half or a quarter of them, and
// then the block is worked on in that many parts; wider vectors than the target's make GCC spill.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kRows = 16;
using Float = float __attribute__((vector_size(4 * kLanes)));
using Int = int32_t __attribute__((vector_size(4 * kLanes)));
using Word = uint32_t __attribute__((vector_size(4 * kLanes)));

// Tokens that share one decoding of the weights, and tokens that share one dequantized panel at a time: as
// many as leave their sums in registers.
constexpr int kDecodeTokens = 4;
constexpr int kPanelTokens = 8;
// From here on dequantizing a panel to memory once costs less than decoding it again for every few tokens.
constexpr int kPanelFrom = 6;
constexpr int kMaxGroup = 128;

template <class V, class T>
GEMQ_INLINE V load(const T* at) {
  V value;
  __builtin_memcpy(&value, at, sizeof value);
  return value;
}

GEMQ_INLINE void store(float* at, Float value) { __builtin_memcpy(at, &value, sizeof value); }

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

// The P-bit fields at `shift` of a row's words as floats.
template <int P>
GEMQ_INLINE Float decode(Word words, int shift) {
#if defined(__AVX512F__)
  // A table look-up takes the low four bits of each lane and ignores the rest: no mask, no conversion.
  if constexpr (P <= 4) {
    constexpr int kMask = (1 << P) - 1;
    const Float table = {0 & kMask,  1 & kMask,  2 & kMask,  3 & kMask, 4 & kMask,  5 & kMask,
                         6 & kMask,  7 & kMask,  8 & kMask,  9 & kMask, 10 & kMask, 11 & kMask,
                         12 & kMask, 13 & kMask, 14 & kMask, 15 & kMask};
    return (Float)_mm512_permutexvar_ps((__m512i)(words >> shift), (__m512)table);
  }
#endif
  return __builtin_convertvector((Int)((words >> shift) & ((1u << P) - 1)), Float);
}

// sum[t] += scale * (fields of one plane of one group) . x[t]; several chains where few tokens leave the
// multipliers waiting for each other.
template <int P, int T>
GEMQ_INLINE void plane_dot(const uint8_t* codes, int group, const float* const* x, float scale, Float* sum) {
  constexpr int kChains = T == 1 ? 4 : 2;
  Float chain[T][kChains] = {};
  for (int c = 0; c < group; c += 32 / P, codes += 64) {
    const Word words = load<Word>(codes);
#pragma GCC unroll 8
    for (int f = 0; f < 8 / P; ++f) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Float q = decode<P>(words, 8 * j + P * f);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) chain[t][j % kChains] += q * x[t][c + 4 * f + j];
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int i = 1; i < kChains; ++i) chain[t][0] += chain[t][i];
    sum[t] += chain[t][0] * scale;
  }
}

// Calls f(plane width as a constant, bit of the code that it starts at, its bytes) for each plane of a group.
template <int P>
struct Constant {
  static constexpr int value = P;
};
template <class F>
GEMQ_INLINE void for_each_plane(int bits, int group, const uint8_t* codes, F&& f) {
  if (bits == 8) return f(Constant<8>(), 0, codes);
  if (bits & 4) f(Constant<4>(), 0, codes);
  if (bits & 2) f(Constant<2>(), bits & 4, codes + 2 * group * (bits & 4));
  if (bits & 1) f(Constant<1>(), bits & 6, codes + 2 * group * (bits & 6));
}

// T tokens against kLanes rows of the block from `lane`, decoding as it goes: s * sum(q * x) + m * sum(x) in
// every group.
template <int T>
void decode_tokens(const BlockArgs& a, int lane, int first_token, float* out) {
  const int32_t* rows = a.rows + first_token;
  out += kRows * first_token + lane;
  const float *x[T], *sums[T];
  const int groups = a.k / a.group_size;
  for (int t = 0; t < T; ++t) {
    x[t] = a.x + static_cast<int64_t>(rows[t]) * a.k;
    sums[t] = a.sums + static_cast<int64_t>(rows[t]) * groups;
  }
  Float total[T] = {};
  const uint8_t* codes = a.codes + 4 * lane;
  const uint16_t* meta = a.meta + lane;
  for (int g = 0; g < groups; ++g, codes += 2 * a.group_size * a.bits) {
    Float part[T] = {};
    for_each_plane(a.bits, a.group_size, codes, [&](auto width, int first, const uint8_t* plane) {
      plane_dot<decltype(width)::value, T>(plane, a.group_size, x, static_cast<float>(1 << first), part);
    });
    const Float s = load_half(meta + 2 * kRows * g), m = load_half(meta + 2 * kRows * g + kRows);
    for (int t = 0; t < T; ++t) {
      total[t] += s * part[t] + m * sums[t][g];
      x[t] += a.group_size;
    }
  }
  for (int t = 0; t < T; ++t) store(out + kRows * t, total[t]);
}

// panel[c] = (first plane ? m : panel[c]) + s * field
template <int P>
GEMQ_INLINE void expand_plane(const uint8_t* codes, int group, Float s, const Float* m, Float* panel) {
  for (int c = 0; c < group; c += 32 / P, codes += 64) {
    const Word words = load<Word>(codes);
#pragma GCC unroll 8
    for (int f = 0; f < 8 / P; ++f) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int at = c + 4 * f + j;
        panel[at] = (m != nullptr ? *m : panel[at]) + decode<P>(words, 8 * j + P * f) * s;
      }
    }
  }
}

template <int T>
void panel_times(const Float* panel, int group, const BlockArgs& a, const int32_t* rows, int64_t column,
                 float* out) {
  const float* x[T];
  for (int t = 0; t < T; ++t) x[t] = a.x + static_cast<int64_t>(rows[t]) * a.k + column;
  Float sum[T] = {};
  for (int c = 0; c < group; ++c) {
    const Float w = panel[c];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[t] += w * x[t][c];
  }
  for (int t = 0; t < T; ++t) store(out + kRows * t, load<Float>(out + kRows * t) + sum[t]);
}

// The panel of one group against all tokens, a few at a time.
void panel_all(const Float* panel, const BlockArgs& a, int64_t column, float* out) {
  const auto times = [&](auto count, int t) {
    panel_times<decltype(count)::value>(panel, a.group_size, a, a.rows + t, column, out + kRows * t);
  };
  int t = 0;
  for (; t + kPanelTokens <= a.count; t += kPanelTokens) times(Constant<kPanelTokens>(), t);
  switch (a.count - t) {
    case 7:
      return times(Constant<7>(), t);
    case 6:
      return times(Constant<6>(), t);
    case 5:
      return times(Constant<5>(), t);
    case 4:
      return times(Constant<4>(), t);
    case 3:
      return times(Constant<3>(), t);
    case 2:
      return times(Constant<2>(), t);
    case 1:
      return times(Constant<1>(), t);
    default:
      return;
  }
}

// Many tokens: each group's panel is dequantized once and multiplied against all of them.
void panel_tokens(const BlockArgs& a, int lane, float* out) {
  Float panel[kMaxGroup];
  out += lane;
  for (int t = 0; t < a.count; ++t) store(out + kRows * t, Float{});
  const uint8_t* codes = a.codes + 4 * lane;
  const uint16_t* meta = a.meta + lane;
  for (int g = 0; g < a.k / a.group_size; ++g, codes += 2 * a.group_size * a.bits) {
    const Float s = load_half(meta + 2 * kRows * g), m = load_half(meta + 2 * kRows * g + kRows);
    for_each_plane(a.bits, a.group_size, codes, [&](auto width, int first, const uint8_t* plane) {
      const Float scale = s * static_cast<float>(1 << first);
      expand_plane<decltype(width)::value>(plane, a.group_size, scale, first == 0 ? &m : nullptr, panel);
    });
    panel_all(panel, a, static_cast<int64_t>(g) * a.group_size, out);
  }
}

void decode_all(const BlockArgs& a, int lane, float* out) {
  int t = 0;
  for (; t + kDecodeTokens <= a.count; t += kDecodeTokens) decode_tokens<kDecodeTokens>(a, lane, t, out);
  switch (a.count - t) {
    case 3:
      return decode_tokens<3>(a, lane, t, out);
    case 2:
      return decode_tokens<2>(a, lane, t, out);
    case 1:
      return decode_tokens<1>(a, lane, t, out);
    default:
      return;
  }
}

void block_product(const BlockArgs& a, float* out) {
  for (int lane = 0; lane < kRows; lane += kLanes) {
    a.count >= kPanelFrom ? panel_tokens(a, lane, out) : decode_all(a, lane, out);
  }
}

void group_sums(const float* x, int k, int group_size, float* sums) {
  for (int c = 0; c < k; c += group_size) {
    Float lanes = {};
    for (int i = 0; i < group_size; i += kLanes) lanes += load<Float>(x + c + i);
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += lanes[i];
    sums[c / group_size] = sum;
  }
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

void silu_mul(const float* gate, const float* up, float* out, int blocks) {
  for (int i = 0; i < kRows * blocks; i += kLanes) {
    const Float g = load<Float>(gate + i);
    store(out + i, g / (exp_float(-g) + 1.0f) * load<Float>(up + i));
  }
}

}  // namespace

namespace GEMQ_VARIANT {
void gptq_rows(const GptqRows& args);  // gptq/rows.cpp, compiled for the same instruction set
}

#define GEMQ_TEXT_OF(name) #name
#define GEMQ_TEXT(name) GEMQ_TEXT_OF(name)
extern const Kernels GEMQ_KERNELS;
const Kernels GEMQ_KERNELS = {GEMQ_TEXT(GEMQ_VARIANT), block_product, group_sums, silu_mul,
                              GEMQ_VARIANT::gptq_rows};

}  // namespace gemq
