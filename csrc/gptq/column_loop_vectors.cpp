// GPTQ's column loop on the CPU. Compiled once for each instruction set, see moe_cpu/vectors.h; a lane is a
// row.
#include "gptq/column_loop.h"
#include "gptq/group.h"
#include "moe_cpu/vectors.h"

namespace gemq {
namespace {

#if defined(__AVX512F__)
// PowerNorm by a polynomial of the mantissa times 2^(1.2 * exponent), which two registers hold for the 32
// binary orders below the square of the range that errors keep within. What is smaller counts as the smallest
// of them.
template <class Ops>
struct TableNorm {
  Int base;
  Float least;

  // 2^-16 exceeds what float16's smallest steps add to an error
  explicit TableNorm(Float range) {
    const Float most = (range + 0x1p-16f) * (range + 0x1p-16f);
    base = (Int)most & 0x7f800000;
    least = (Float)(base - (31 << 23));
  }
  GEMQ_INLINE Float power(Int orders) {
    // clang-format off
    alignas(64) static constexpr float kPowers[32] = {  // [order mod 32]
        1.0f, 6.33408907e-12f, 1.45519152e-11f, 3.34315214e-11f, 7.68054717e-11f, 1.7645263e-10f,
        4.053817e-10f, 9.31322575e-10f, 2.13961737e-09f, 4.91555019e-09f, 1.12929683e-08f, 2.59444288e-08f,
        5.96046448e-08f, 1.36935512e-07f, 3.14595212e-07f, 7.22749974e-07f, 1.66044344e-06f, 3.81469727e-06f,
        8.76387276e-06f, 2.01340936e-05f, 4.62559983e-05f, 0.00010626838f, 0.000244140625f, 0.000560887856f,
        0.00128858199f, 0.00296038389f, 0.00680117635f, 0.015625f, 0.0358968228f, 0.0824692473f,
        0.189464569f, 0.435275286f,
    };
    // clang-format on
    return (Float)_mm512_permutex2var_ps(_mm512_load_ps(kPowers), (__m512i)orders,
                                         _mm512_load_ps(kPowers + 16));
  }
  Float operator()(Float square) const {
    const Float x = greater(square, least);
    const Float m = (Float)(((Int)x & 0x007fffff) | 0x3f800000);
    Float p = m * 0.00517445058f - 0.0470276997f;  // m^1.2 to 2.5e-6
    p = p * m + 0.228435755f;
    p = p * m + 0.863674819f;
    p = p * m - 0.0502597764f;
    return p * power(((Int)x - base) >> 23);
  }
  static Float root(Float sum) { return PowerNorm<Ops>::root(sum); }
};
#endif

struct VectorOps {
  using V = Float;
  using I = Int;
#if defined(__AVX512F__)
  using PaperNorm = TableNorm<VectorOps>;
#else
  using PaperNorm = PowerNorm<VectorOps>;
#endif
  GEMQ_INLINE I bits(V value) { return (I)value; }
  GEMQ_INLINE V from_bits(I value) { return (V)value; }
  GEMQ_INLINE V to_float(I value) { return __builtin_convertvector(value, V); }
  // whether any lane is below the limit
  GEMQ_INLINE bool any_below(V value, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)value, _mm512_set1_ps(limit), _CMP_LT_OQ) != 0;
#else
    bool any = false;
    for (int r = 0; r < kLanes; ++r) any |= value[r] < limit;
    return any;
#endif
  }
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
