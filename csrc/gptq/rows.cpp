// Compiled once for each instruction set, like moe_cpu/kernels.cpp and under the same rule: no external
// linkage but gemq::<variant>::gptq_rows. A lane is a row; rows do not see each other.
#include <cmath>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "gemq/half.h"
#include "gptq/group.h"

namespace gemq {
namespace {

constexpr int kRows = 16;
constexpr int kMaxGroup = 128;
constexpr float kTinyHalf = 5.9604644775390625e-8f;  // 2^-24, the smallest float16 above zero

struct Lanes {
  float at[kRows];
};

struct Grid {
  Lanes s, m;
};

inline float round_half(float value) {
#ifdef __F16C__
  return _cvtsh_ss(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  return half_to_float(float_to_half(value));
#endif
}

// log2 and exp2 to about 1e-6, as plain arithmetic that vectorises; libm's do not.
inline float fast_log2(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t shifted = bits - 0x3f3504f3u;  // mantissa into [sqrt(1/2), sqrt(2))
  const float exponent = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = bits_float((shifted & 0x007fffffu) + 0x3f3504f3u);
  const float r = (f - 1.0f) / (f + 1.0f), r2 = r * r;
  return exponent + r * (2.88539008f + r2 * (0.961796694f + r2 * (0.577078016f + r2 * 0.412198583f)));
}

inline float fast_exp2(float x) {
  const float whole = std::nearbyintf(x), f = x - whole;
  const float p =
      1.0f + f * (0.693147181f +
                  f * (0.240226507f + f * (0.0555041087f + f * (0.00961812911f + f * 0.00133335581f))));
  return bits_float(float_bits(p) + (static_cast<uint32_t>(static_cast<int32_t>(whole)) << 23));
}

inline float code_of(float w, float s, float m, float max_code) {
  const float code = std::nearbyintf((w - m) / s);
  return std::fmin(std::fmax(code, 0.0f), max_code);
}

// sum over the group of |error|^norm, with norm 2.4 as the paper's scripts or 2.
template <bool kPaperNorm>
Lanes grid_error(const Lanes* w, int group, const Grid& grid, float max_code) {
  Lanes sum{};
  for (int k = 0; k < group; ++k) {
#pragma GCC ivdep
    for (int r = 0; r < kRows; ++r) {
      const float code = code_of(w[k].at[r], grid.s.at[r], grid.m.at[r], max_code);
      const float error = code * grid.s.at[r] + grid.m.at[r] - w[k].at[r];
      const float square = error * error;
      // 1e-36 keeps the logarithm of an exact hit finite; its term vanishes beside any other
      sum.at[r] += kPaperNorm ? fast_exp2(1.2f * fast_log2(square + 1e-36f)) : square;
    }
  }
  return sum;
}

Grid scaled_range(const Lanes& low, const Lanes& high, float factor, float max_code) {
  Grid grid;
  for (int r = 0; r < kRows; ++r) {
    grid.s.at[r] = std::fmax(round_half(factor * (high.at[r] - low.at[r]) / max_code), kTinyHalf);
    grid.m.at[r] = round_half(factor * low.at[r]);
  }
  return grid;
}

Grid binary_grid(const Lanes* w, int group) {
  Lanes sum{};
  for (int k = 0; k < group; ++k) {
    for (int r = 0; r < kRows; ++r) sum.at[r] += std::fabs(w[k].at[r]);
  }
  Grid grid;
  for (int r = 0; r < kRows; ++r) {
    grid.s.at[r] = std::fmax(round_half(2.0f * (sum.at[r] / static_cast<float>(group))), kTinyHalf);
    grid.m.at[r] = round_half(-grid.s.at[r] / 2.0f);
  }
  return grid;
}

int factor_count(Clip clip) { return clip == Clip::kNone ? 1 : clip == Clip::kPaper ? 101 : 41; }

// The unscaled range comes first, so that ties keep it.
float factor_at(Clip clip, int index) {
  if (clip == Clip::kMse) return static_cast<float>(1 - 0.02 * index);
  return static_cast<float>(index <= 50 ? 1 + 0.002 * index : 1 - 0.002 * (index - 50));
}

Grid find_grid(const Lanes* w, int group, int bits, Clip clip) {
  if (bits == 1) return binary_grid(w, group);
  const float max_code = static_cast<float>((1 << bits) - 1);
  Lanes low{}, high{}, best;
  for (int k = 0; k < group; ++k) {
    for (int r = 0; r < kRows; ++r) {
      low.at[r] = std::fmin(low.at[r], w[k].at[r]);
      high.at[r] = std::fmax(high.at[r], w[k].at[r]);
    }
  }
  Grid grid = scaled_range(low, high, 1.0f, max_code);
  if (clip == Clip::kNone) return grid;
  for (int index = 0; index < factor_count(clip); ++index) {
    const Grid tried = scaled_range(low, high, factor_at(clip, index), max_code);
    const Lanes error = clip == Clip::kPaper ? grid_error<true>(w, group, tried, max_code)
                                             : grid_error<false>(w, group, tried, max_code);
    for (int r = 0; r < kRows; ++r) {
      const bool better = index == 0 || error.at[r] < best.at[r];
      best.at[r] = better ? error.at[r] : best.at[r];
      grid.s.at[r] = better ? tried.s.at[r] : grid.s.at[r];
      grid.m.at[r] = better ? tried.m.at[r] : grid.m.at[r];
    }
  }
  return grid;
}

void quantize_columns(const GptqRows& args, Lanes* w, const Grid& grid) {
  const float max_code = static_cast<float>((1 << args.bits) - 1);
  for (int i = 0; i < args.group; ++i) {
    const float* row = args.factor + static_cast<int64_t>(i) * args.group;
    Lanes code, error;
#pragma GCC ivdep
    for (int r = 0; r < kRows; ++r) {
      const float value = w[i].at[r];
      code.at[r] = args.bits == 1 ? static_cast<float>(value >= 0.0f)
                                  : code_of(value, grid.s.at[r], grid.m.at[r], max_code);
      error.at[r] = (value - (code.at[r] * grid.s.at[r] + grid.m.at[r])) / row[i];
    }
    for (int r = 0; r < args.rows; ++r) {
      args.codes[static_cast<int64_t>(r) * args.group + i] = static_cast<uint8_t>(code.at[r]);
      args.errors[static_cast<int64_t>(r) * args.group + i] = error.at[r];
    }
    if (!args.propagate) continue;
    for (int j = i + 1; j < args.group; ++j) {
#pragma GCC ivdep
      for (int r = 0; r < kRows; ++r) w[j].at[r] -= error.at[r] * row[j];
    }
  }
}

}  // namespace

namespace GEMQ_VARIANT {

void gptq_rows(const GptqRows& args) {
  Lanes w[kMaxGroup];
  for (int k = 0; k < args.group; ++k) {
    for (int r = 0; r < kRows; ++r) w[k].at[r] = r < args.rows ? args.block[r * args.group + k] : 0.0f;
  }
  const Grid grid = find_grid(w, args.group, args.bits, args.clip);
  for (int r = 0; r < args.rows; ++r) {
    args.meta[2 * r] = float_to_half(grid.s.at[r]);
    args.meta[2 * r + 1] = float_to_half(grid.m.at[r]);
  }
  quantize_columns(args, w, grid);
}

}  // namespace GEMQ_VARIANT
}  // namespace gemq
