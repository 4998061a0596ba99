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

// With VNNI this many neighbouring fields stay where they are in their byte, 2^(P * f) times too large, each
// in sums of its own that are shifted down once a group instead of once a vector. Without, 16-bit sums of
// fields at the top of a byte would saturate.
template <int P>
constexpr int kInPlace = !kVnni || P == 8        ? 1
                         : kLanes == 8 || P == 4 ? 2
                                                 : 4;

// sum[part][term] = codes of one plane, one group of each part . one token.
template <int P, int TERMS, int PARTS>
GEMQ_INLINE void plane_sums(const uint8_t* codes, int64_t part_bytes, int group, const int8_t* x,
                            Int (*sum)[TERMS]) {
  constexpr int kFields = 8 / P, kKept = kInPlace<P>;
  Int field[PARTS][TERMS][kKept] = {};
#pragma GCC unroll 4
  for (int c = 0; c < group; c += 32 / P, codes += 64) {
    prefetch(codes + kAhead);
    Word words[PARTS];
#pragma GCC unroll 2
    for (int p = 0; p < PARTS; ++p) words[p] = load<Word>(codes + p * part_bytes);
#pragma GCC unroll 8
    for (int f = 0; f < kFields; ++f) {
      Bytes activations[TERMS];
#pragma GCC unroll 2
      for (int t = 0; t < TERMS; ++t) activations[t] = four(x + TERMS * (c + 4 * f) + 4 * t);
#pragma GCC unroll 2
      for (int p = 0; p < PARTS; ++p) {
        const Word part = (words[p] >> (P * (f - f % kKept))) & (kFieldMask<P> << (P * (f % kKept)));
#pragma GCC unroll 2
        for (int t = 0; t < TERMS; ++t) {
          Int& to = field[p][t][f % kKept];
          to = dot<P == 8>(to, (Bytes)part, activations[t]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < PARTS; ++p) {
#pragma GCC unroll 2
    for (int t = 0; t < TERMS; ++t) {
#pragma GCC unroll 4
      for (int f = kKept - 1; f > 0; --f) field[p][t][f - 1] += field[p][t][f] >> P;
      sum[p][t] = field[p][t][0];
    }
  }
}

// a | (b & mask)
GEMQ_INLINE Word or_masked(Word a, Word b, Word mask) {
#if defined(__AVX512F__)
  return (Word)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)mask, 0xf8);
#else
  return a | (b & mask);
#endif
}

// The P-bit fields of columns 4 * quad and the next three, at bit `first` of each byte of `code`.
template <int P>
GEMQ_INLINE Word with_fields(Word code, const uint8_t* plane, int quad, int first) {
  constexpr int kFields = 8 / P;
  const Word words = load<Word>(plane + quad / kFields * 64);
  const int down = quad % kFields * P - first;
  return or_masked(code, down >= 0 ? words >> down : words << -down, (kFieldMask<P> << first) - Word{});
}

// The same for widths of several planes: codes are put together first, so that each meets the activations
// once.
template <int BITS, int TERMS, int PARTS>
GEMQ_INLINE void joined_sums(const uint8_t* codes, int64_t part_bytes, int group, const int8_t* x,
                             Int (*sum)[TERMS]) {
  constexpr int kChains = kLanes == 16 ? 4 : 2;  // sums that do not wait for each other
  constexpr int kQuads = 8;                      // of 32 columns, one vector of the 1-bit plane
  Int chain[PARTS][TERMS][kChains] = {};
  for (int c = 0; c < group; c += 4 * kQuads) {
    const uint8_t *fours = codes + 8 * c, *twos = codes + 2 * group * (BITS & 4) + 4 * c,
                  *ones = codes + 2 * group * (BITS & 6) + 2 * c;
#pragma GCC unroll 8
    for (int i = 0; i < BITS; ++i) prefetch(codes + 2 * c * BITS + 64 * i + kAhead);
#pragma GCC unroll 8
    for (int quad = 0; quad < kQuads; ++quad) {
      Bytes activations[TERMS];
#pragma GCC unroll 2
      for (int t = 0; t < TERMS; ++t) activations[t] = four(x + TERMS * (c + 4 * quad) + 4 * t);
#pragma GCC unroll 2
      for (int p = 0; p < PARTS; ++p) {
        Word code = {};
        if constexpr ((BITS & 4) != 0) code = with_fields<4>(code, fours + p * part_bytes, quad, 0);
        if constexpr ((BITS & 2) != 0) code = with_fields<2>(code, twos + p * part_bytes, quad, BITS & 4);
        if constexpr ((BITS & 1) != 0) code = with_fields<1>(code, ones + p * part_bytes, quad, BITS & 6);
#pragma GCC unroll 2
        for (int t = 0; t < TERMS; ++t) {
          Int& to = chain[p][t][quad % kChains];
          to = dot<false>(to, (Bytes)code, activations[t]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < PARTS; ++p) {
#pragma GCC unroll 2
    for (int t = 0; t < TERMS; ++t) {
#pragma GCC unroll 4
      for (int i = 1; i < kChains; ++i) chain[p][t][0] += chain[p][t][i];
      sum[p][t] = chain[p][t][0];
    }
  }
}

// total + s * (scale * sum) + m * (sum of x)
GEMQ_INLINE Float add_group(Float total, Int sum, float scale, float x_sum, Float s, Float m) {
  total += (__builtin_convertvector(sum, Float) * scale) * s;
  return total + m * x_sum;
}

// Where registers of rows lie: their codes and metadata in the tile, their columns of the output. The second
// of two is so many bytes, float16 elements and floats after the first.
struct Parts {
  const uint8_t* codes;
  const uint16_t* meta;
  float* out;
  int64_t code_step, meta_step, out_step;
  int64_t block_out;  // floats from a block to the next
};

// One token, block after block. BITS and GROUP are constants so that a group's loops unroll; GROUP 0 is any
// size.
template <int BITS, int GROUP, int TERMS, int PARTS>
void one_token(const BlockArgs& a, int token, Parts at) {
  const int group = GROUP > 0 ? GROUP : a.group_size;
  const int64_t row = a.rows.index[token], groups = a.k / group;
  const int64_t step = a.rows.rows;
  for (int block = 0; block < a.blocks; ++block, at.out += at.block_out) {
    const int8_t* x = a.rows.q + row * group * TERMS;
    const float *scale = a.rows.scales + row, *x_sum = a.rows.sums + row;
    Float total[PARTS] = {};
    for (int64_t g = 0; g < groups; ++g) {
      Int sum[PARTS][TERMS] = {};
      if constexpr (BITS == 3 || (BITS > 4 && BITS < 8)) {
        joined_sums<BITS, TERMS, PARTS>(at.codes, at.code_step, group, x, sum);
      } else {
        plane_sums<BITS, TERMS, PARTS>(at.codes, at.code_step, group, x, sum);
      }
      prefetch(at.meta + kMetaAhead / 2);
#pragma GCC unroll 2
      for (int p = 0; p < PARTS; ++p) {
        const uint16_t* meta = at.meta + p * at.meta_step;
        if constexpr (TERMS == 2) sum[p][0] = (sum[p][0] << 8) + sum[p][1];
        total[p] = add_group(total[p], sum[p][0], *scale, *x_sum, load_half(meta), load_half(meta + kRows));
      }
      at.codes += 2 * group * BITS;
      at.meta += 2 * kRows;
      x += step * group * TERMS;
      scale += step;
      x_sum += step;
    }
#pragma GCC unroll 2
    for (int p = 0; p < PARTS; ++p) store(at.out + p * at.out_step, total[p]);
  }
}

template <int TERMS, int PARTS>
void one_token_of_any_width(const BlockArgs& a, int token, Parts at) {
  at.out += kRows * token;
  const auto run = [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    a.group_size == kMaxGroup ? one_token<kBits, kMaxGroup, TERMS, PARTS>(a, token, at)
                              : one_token<kBits, 0, TERMS, PARTS>(a, token, at);
  };
  switch (a.bits) {
    case 1:
      return run(Constant<1>());
    case 2:
      return run(Constant<2>());
    case 3:
      return run(Constant<3>());
    case 4:
      return run(Constant<4>());
    case 5:
      return run(Constant<5>());
    case 6:
      return run(Constant<6>());
    case 7:
      return run(Constant<7>());
    default:
      return run(Constant<8>());
  }
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
  const int8_t* x[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    x[t] = a.rows.q + (g * a.rows.rows + a.rows.index[first_token + t]) * a.group_size * TERMS;
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
        const Bytes activations = four(x[t] + 4 * (TERMS * i + term));
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) {
          sum[term][t][p] = dot<kWide>(sum[term][t][p], codes[p], activations);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const int64_t at = g * a.rows.rows + a.rows.index[first_token + t];
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

// `pairs` pairs of registers of rows, group by group, so that all of them meet a group's activations at once.
template <int TERMS>
void many_tokens(const BlockArgs& a, const Parts* at, int pairs) {
  for (int i = 0; i < pairs * kParts; ++i) {
    float* out = at[i / kParts].out + i % kParts * at[i / kParts].out_step;
    for (int t = 0; t < a.rows.count; ++t) store(out + kRows * t, Float{});
  }
  for (int64_t g = 0; g < a.k / a.group_size; ++g) {
    for (int pair = 0; pair < pairs; ++pair) {
      const Parts& from = at[pair];
      Word panel[kParts][kSteps];
      GroupMeta meta[kParts];
      float* const out[kParts] = {from.out, from.out + from.out_step};
      for (int p = 0; p < kParts; ++p) {
        const uint16_t* halves = from.meta + p * from.meta_step + 2 * kRows * g;
        prefetch(halves + kMetaAhead / 2);
        meta[p] = {load_half(halves), load_half(halves + kRows)};
        const uint8_t* codes = from.codes + p * from.code_step + 2 * a.group_size * a.bits * g;
        for_each_plane(a.bits, a.group_size, codes, [&](auto width, int first, const uint8_t* plane) {
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
}

// Few tokens: block after block, as memory has them, once for each token; from a near cache that costs less
// than unpacking. A pair of blocks at a time would be two streams with gaps between. More tokens: two
// registers of rows share the loads of activations, two blocks with AVX-512, the halves of a block with AVX2.
template <int TERMS>
void product(const BlockArgs& a, float* out) {
  constexpr int kSplit = kRows / kLanes;
  const int64_t code_bytes = static_cast<int64_t>(a.k) * 2 * a.bits, halves = a.k / a.group_size * 32;
  const int64_t block_out = static_cast<int64_t>(kRows) * a.rows.count;
  const Parts first{a.codes, a.meta, out, 4 * kLanes, kLanes, kLanes, block_out};
  if (a.rows.count <= kFewTokens) {
    for (int t = 0; t < a.rows.count; ++t) one_token_of_any_width<TERMS, kSplit>(a, t, first);
    return;
  }
  constexpr int kStep = kParts / kSplit;  // blocks of a pair
  Parts at[kSomeBlocks];
  int pairs = 0;
  for (int block = 0; block < a.blocks; block += kStep, ++pairs) {
    at[pairs] = first;
    at[pairs].codes += block * code_bytes;
    at[pairs].meta += block * halves;
    at[pairs].out += block * block_out;
    if (kSplit == 1) {
      // a block without another is computed twice; the tile has room for the copy that nobody reads
      const bool whole = block + 1 < a.blocks;
      at[pairs].code_step = whole ? code_bytes : 0;
      at[pairs].meta_step = whole ? halves : 0;
      at[pairs].out_step = block_out;
    }
  }
  many_tokens<TERMS>(a, at, pairs);
}

}  // namespace
#endif

namespace GEMQ_VARIANT {

#ifdef __AVX2__
void integer_product(const BlockArgs& a, float* out) {
  a.rows.terms == 2 ? product<2>(a, out) : product<1>(a, out);
}
#endif

}  // namespace GEMQ_VARIANT
}  // namespace gemq
