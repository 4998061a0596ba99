// Products with float32 activations. Compiled once for each instruction set, see vectors.h.
#include "moe_cpu/kernels.h"
#include "moe_cpu/vectors.h"

namespace gemq {
namespace {

// Tokens that share one decoding of the weights, and tokens that share one dequantized panel at a time: as
// many as leave their sums in registers.
constexpr int kDecodeTokens = 4;
constexpr int kPanelTokens = 8;
// From here on dequantizing a panel to memory once costs less than decoding it again for every few tokens.
constexpr int kPanelFrom = 6;

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
    prefetch(codes + kAhead);
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

// T tokens against kLanes rows of the block from `lane`, decoding as it goes: s * sum(q * x) + m * sum(x) in
// every group.
template <int T>
void decode_tokens(const BlockArgs& a, int lane, int first_token, float* out) {
  const int32_t* rows = a.rows.index + first_token;
  out += kRows * first_token + lane;
  const float *x[T], *sums[T];
  const int groups = a.k / a.group_size;
  for (int t = 0; t < T; ++t) {
    x[t] = a.rows.x + static_cast<int64_t>(rows[t]) * a.k;
    sums[t] = a.rows.sums + rows[t];
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
      total[t] += s * part[t] + m * sums[t][g * a.rows.rows];
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
  for (int t = 0; t < T; ++t) x[t] = a.rows.x + static_cast<int64_t>(rows[t]) * a.k + column;
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
  in_runs<kPanelTokens>(a.rows.count, [&](auto count, int t) {
    panel_times<decltype(count)::value>(panel, a.group_size, a, a.rows.index + t, column, out + kRows * t);
  });
}

// Many tokens: each group's panel is dequantized once and multiplied against all of them.
void panel_tokens(const BlockArgs& a, int lane, float* out) {
  Float panel[kMaxGroup];
  out += lane;
  for (int t = 0; t < a.rows.count; ++t) store(out + kRows * t, Float{});
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

void one_block(const BlockArgs& a, int lane, float* out) {
  if (a.rows.count >= kPanelFrom) return panel_tokens(a, lane, out);
  in_runs<kDecodeTokens>(a.rows.count,
                         [&](auto count, int t) { decode_tokens<decltype(count)::value>(a, lane, t, out); });
}

}  // namespace

namespace GEMQ_VARIANT {

void exact_product(const BlockArgs& args, float* out) {
  BlockArgs a = args;
  for (int block = 0; block < args.blocks; ++block) {
    for (int lane = 0; lane < kRows; lane += kLanes) one_block(a, lane, out);
    a.codes += static_cast<int64_t>(a.k) * 2 * a.bits;
    a.meta += a.k / a.group_size * 32;
    out += kRows * a.rows.count;
  }
}

}  // namespace GEMQ_VARIANT
}  // namespace gemq
