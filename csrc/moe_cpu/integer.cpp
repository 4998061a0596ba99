// Products with integer activations. Compiled once for each instruction set, see vectors.h.
//
// A byte of codes times a signed byte of activations, four columns of 16 rows an instruction: sums over a
// group are exact integers, and only then scaled, so that results do not depend on how many tokens share a
// call.
#include "moe_cpu/kernels.h"
#include "moe_cpu/vectors.h"

namespace gemq {

#ifdef __AVX2__
namespace {

#if defined(__AVX512F__)
using Bytes = __m512i;
#else
using Bytes = __m256i;
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif

// Four int8 activations in every lane.
GEMQ_INLINE Bytes four(const int8_t* x) {
  int32_t word;
  __builtin_memcpy(&word, x, sizeof word);
  return (Bytes)(word - Int{});
}

#if !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
// Sums of pairs saturate at 16 bits: codes must be below 128.
GEMQ_INLINE Int dot_small(Bytes codes, Bytes x) {
#if defined(__AVX512F__)
  return (Int)_mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(1));
#else
  return (Int)_mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1));
#endif
}
#endif

// sum + codes . x over the four bytes of each lane; kWide: codes may be 128 and above.
template <bool kWide>
GEMQ_INLINE Int dot(Int sum, Bytes codes, Bytes x) {
#if defined(__AVX512VNNI__)
  return (Int)_mm512_dpbusd_epi32((__m512i)sum, codes, x);
#elif defined(__AVXVNNI__)
  return (Int)_mm256_dpbusd_avx_epi32((__m256i)sum, codes, x);
#else
  if constexpr (kWide) {
    const Word nibbles = 0x0f0f0f0f - Word{};
    return sum + dot_small((Bytes)((Word)codes & nibbles), x) +
           (dot_small((Bytes)(((Word)codes >> 4) & nibbles), x) << 4);
  } else {
    return sum + dot_small(codes, x);
  }
#endif
}

template <int P>
constexpr uint32_t kFieldMask = ((1u << P) - 1) * 0x01010101u;

// sum[term] = fields of one plane of one group . one token. With VNNI the fields stay where they are in their
// byte, 2^(P * f) times too large, and are shifted down once a group instead of once a vector.
template <int P, int TERMS>
GEMQ_INLINE void plane_sums(const uint8_t* codes, int group, const int8_t* const* x, Int* sum) {
  constexpr int kFields = 8 / P;
  Int field[TERMS][kFields] = {};
  for (int c = 0; c < group; c += 32 / P, codes += 64) {
    prefetch(codes + kAhead);
    const Word words = load<Word>(codes);
#pragma GCC unroll 8
    for (int f = 0; f < kFields; ++f) {
      const Word part = kVnni ? words & (kFieldMask<P> << (P * f)) : (words >> (P * f)) & kFieldMask<P>;
#pragma GCC unroll 2
      for (int t = 0; t < TERMS; ++t) {
        field[t][f] = dot<P == 8>(field[t][f], (Bytes)part, four(x[t] + c + 4 * f));
      }
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < TERMS; ++t) {
#pragma GCC unroll 8
    for (int f = kFields - 1; f > 0; --f) field[t][f - 1] += kVnni ? field[t][f] >> P : field[t][f];
    sum[t] = field[t][0];
  }
}

// total + s * (scale * sum) + m * (sum of x)
GEMQ_INLINE Float add_group(Float total, Int sum, float scale, float x_sum, Float s, Float m) {
  total += (__builtin_convertvector(sum, Float) * scale) * s;
  return total + m * x_sum;
}

// One token against kLanes rows of one block.
template <int TERMS>
void one_token(const BlockArgs& a, const uint8_t* codes, const uint16_t* meta, float* out) {
  const int64_t row = a.rows.index[0], groups = a.k / a.group_size;
  const int8_t* x[TERMS];
  x[0] = a.rows.high + row * a.k;
  if constexpr (TERMS == 2) x[1] = a.rows.low + row * a.k;
  const float *scales = a.rows.scales + row * groups, *sums = a.rows.sums + row * groups;
  Float total = {};
  for (int64_t g = 0; g < groups; ++g, codes += 2 * a.group_size * a.bits, meta += 2 * kRows) {
    prefetch(meta + kMetaAhead / 2);
    Int sum[TERMS] = {};
    for_each_plane(a.bits, a.group_size, codes, [&](auto width, int first, const uint8_t* plane) {
      Int part[TERMS];
      plane_sums<decltype(width)::value, TERMS>(plane, a.group_size, x, part);
#pragma GCC unroll 2
      for (int t = 0; t < TERMS; ++t) sum[t] += part[t] << first;
    });
    if constexpr (TERMS == 2) sum[0] = (sum[0] << 8) + sum[1];
    total = add_group(total, sum[0], scales[g], sums[g], load_half(meta), load_half(meta + kRows));
#pragma GCC unroll 2
    for (int t = 0; t < TERMS; ++t) x[t] += a.group_size;
  }
  store(out, total);
}

// ---- several tokens: a group's codes are unpacked once ----

constexpr int kSteps = kMaxGroup / 4;
constexpr int kParts = 2;  // registers of rows that share a broadcast of activations

// panel[i] = the whole codes of columns 4 * i and the next three
template <int P>
GEMQ_INLINE void unpack_plane(const uint8_t* codes, int group, int first, Word* panel) {
  for (int c = 0; c < group; c += 32 / P, codes += 64) {
    prefetch(codes + kAhead);
    const Word words = load<Word>(codes);
#pragma GCC unroll 8
    for (int f = 0; f < 8 / P; ++f) {
      const Word part = (words >> (P * f)) & kFieldMask<P>;
      Word* at = panel + c / 4 + f;
      *at = first == 0 ? part : *at | part << first;
    }
  }
}

// Two terms of six tokens and two registers of rows fill the 32 registers of AVX-512; AVX2 has 16.
template <int TERMS>
constexpr int kTokens = kLanes == 16 ? (TERMS == 2 ? 6 : 8) : (TERMS == 2 ? 2 : 4);

struct GroupMeta {
  Float s, m;
};

template <int TERMS, int T, bool kWide>
GEMQ_INLINE void panel_times(const Word (*panel)[kSteps], const GroupMeta* meta, const BlockArgs& a,
                             int first_token, int64_t g, float* const* out) {
  const int64_t groups = a.k / a.group_size;
  const int8_t* x[TERMS][T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const int64_t at = static_cast<int64_t>(a.rows.index[first_token + t]) * a.k + g * a.group_size;
    x[0][t] = a.rows.high + at;
    if constexpr (TERMS == 2) x[1][t] = a.rows.low + at;
  }
  Int sum[TERMS][T][kParts] = {};
  for (int i = 0; i < a.group_size / 4; ++i) {
    Bytes codes[kParts];
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) codes[p] = (Bytes)panel[p][i];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
      for (int term = 0; term < TERMS; ++term) {
        const Bytes activations = four(x[term][t] + 4 * i);
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) {
          sum[term][t][p] = dot<kWide>(sum[term][t][p], codes[p], activations);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const int64_t at = a.rows.index[first_token + t] * groups + g;
    const float scale = a.rows.scales[at], x_sum = a.rows.sums[at];
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) {
      float* to = out[p] + kRows * (first_token + t);
      Int whole = sum[0][t][p];
      if constexpr (TERMS == 2) whole = (whole << 8) + sum[1][t][p];
      store(to, add_group(load<Float>(to), whole, scale, x_sum, meta[p].s, meta[p].m));
    }
  }
}

// Where a register's worth of rows lies: its codes and metadata in the tile, its column of the output.
struct Part {
  const uint8_t* codes;
  const uint16_t* meta;
  float* out;
};

template <int TERMS>
void many_tokens(const BlockArgs& a, const Part* parts) {
  Word panel[kParts][kSteps];
  float* const out[kParts] = {parts[0].out, parts[1].out};
  for (int p = 0; p < kParts; ++p) {
    for (int t = 0; t < a.rows.count; ++t) store(out[p] + kRows * t, Float{});
  }
  for (int64_t g = 0; g < a.k / a.group_size; ++g) {
    GroupMeta meta[kParts];
    for (int p = 0; p < kParts; ++p) {
      const uint16_t* at = parts[p].meta + 2 * kRows * g;
      prefetch(at + kMetaAhead / 2);
      meta[p] = {load_half(at), load_half(at + kRows)};
      for_each_plane(a.bits, a.group_size, parts[p].codes + 2 * a.group_size * a.bits * g,
                     [&](auto width, int first, const uint8_t* plane) {
                       unpack_plane<decltype(width)::value>(plane, a.group_size, first, panel[p]);
                     });
    }
    in_runs<kTokens<TERMS>>(a.rows.count, [&](auto count, int t) {
      constexpr int T = decltype(count)::value;
      if (!kVnni && a.bits == 8) return panel_times<TERMS, T, true>(panel, meta, a, t, g, out);
      panel_times<TERMS, T, false>(panel, meta, a, t, g, out);
    });
  }
}

template <int TERMS>
void product(const BlockArgs& a, float* out) {
  const int64_t code_bytes = static_cast<int64_t>(a.k) * 2 * a.bits, halves = a.k / a.group_size * 32;
  Part parts[2 * kRows / kLanes];
  int count = 0;
  for (int block = 0; block < a.blocks; ++block) {
    for (int lane = 0; lane < kRows; lane += kLanes) {
      parts[count++] = {a.codes + block * code_bytes + 4 * lane, a.meta + block * halves + lane,
                        out + block * kRows * a.rows.count + lane};
    }
  }
  if (a.rows.count == 1) {
    for (int p = 0; p < count; ++p) one_token<TERMS>(a, parts[p].codes, parts[p].meta, parts[p].out);
    return;
  }
  // a single register of rows is computed twice, into a place that nobody reads
  if (count == 1) parts[1] = {parts[0].codes, parts[0].meta, out + kRows * a.rows.count};
  for (int p = 0; p < count; p += kParts) many_tokens<TERMS>(a, parts + p);
}

}  // namespace
#endif

namespace GEMQ_VARIANT {

#ifdef __AVX2__
void integer_product(const BlockArgs& a, float* out) {
  a.rows.low != nullptr ? product<2>(a, out) : product<1>(a, out);
}
#endif

}  // namespace GEMQ_VARIANT
}  // namespace gemq
