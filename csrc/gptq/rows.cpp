// GPTQ's column loop on the CPU. Compiled once for each instruction set, see moe_cpu/vectors.h; a lane is a
// row.
#include "gptq/column_loop.h"
#include "gptq/group.h"
#include "moe_cpu/vectors.h"

namespace gemq {
namespace {

struct VectorOps {
  using V = Float;
  using I = Int;
  GEMQ_INLINE I bits(V value) { return (I)value; }
  GEMQ_INLINE V from_bits(I value) { return (V)value; }
  GEMQ_INLINE V to_float(I value) { return __builtin_convertvector(value, V); }
  // rounded to float16 and back
  GEMQ_INLINE V half(V value) {
#if defined(__AVX512F__)
    return (V)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    return (V)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int r = 0; r < kLanes; ++r) value[r] = half_to_float(float_to_half(value[r]));
    return value;
#endif
  }
};

// kLanes rows from `first`, of which `count` exist.
void some_rows(const GptqRows& a, int first, int count) {
  float memory[kMaxGroup][kLanes] __attribute__((aligned(64)));
  for (int k = 0; k < a.group; ++k) {
    for (int r = 0; r < kLanes; ++r) memory[k][r] = r < count ? a.block[(first + r) * a.group + k] : 0.0f;
  }
  const auto w = [&](int k) -> Float& { return *reinterpret_cast<Float*>(memory[k]); };
  const Grid<Float> grid = find_grid<VectorOps>(w, a.group, a.bits, a.clip);
  for (int r = 0; r < count; ++r) {
    a.meta[2 * (first + r)] = float_to_half(grid.s[r]);
    a.meta[2 * (first + r) + 1] = float_to_half(grid.m[r]);
  }
  // codes and errors are written over the columns that are done, and turned into rows at the end
  float codes[kMaxGroup][kLanes] __attribute__((aligned(64)));
  quantize_columns<VectorOps>(w, a.factor, a.group, a.bits, a.propagate, grid,
                              [&](int k, Float code, Float error) {
                                store(codes[k], code);
                                w(k) = error;
                              });
  for (int r = 0; r < count; ++r) {
    uint8_t* to_codes = a.codes + static_cast<int64_t>(first + r) * a.group;
    float* to_errors = a.errors + static_cast<int64_t>(first + r) * a.group;
    for (int k = 0; k < a.group; ++k) {
      to_codes[k] = static_cast<uint8_t>(codes[k][r]);
      to_errors[k] = memory[k][r];
    }
  }
}

}  // namespace

namespace GEMQ_VARIANT {

void gptq_rows(const GptqRows& args) {
  for (int first = 0; first < args.rows; first += kLanes) {
    some_rows(args, first, args.rows - first < kLanes ? args.rows - first : kLanes);
  }
}

}  // namespace GEMQ_VARIANT
}  // namespace gemq
