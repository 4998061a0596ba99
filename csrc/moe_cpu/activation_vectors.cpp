// What happens to activations between the products, and the variant's table of kernels. Compiled once for
// each instruction set, see vectors.h.
#include "moe_cpu/kernels.h"
#include "moe_cpu/vectors.h"

namespace gemq {
namespace {

float group_sum(const float* x, int group_size) {
  Float lanes = {};
  for (int i = 0; i < group_size; i += kLanes) lanes += load<Float>(x + i);
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: a sum with it holds an integer in its low bits

using Small = int8_t __attribute__((vector_size(kLanes)));

// The largest |x| of a group. NaN and infinity come out as at least infinity's bits: as integers, the bits of
// floats without their sign are ordered.
GEMQ_INLINE uint32_t largest(const float* x, int count) {
  Int most = {};
  for (int i = 0; i < count; i += kLanes) {
    const Int size = load<Int>(x + i) & 0x7fffffff;
    most = size > most ? size : most;
  }
  int32_t value = 0;
  for (int i = 0; i < kLanes; ++i) value = most[i] > value ? most[i] : value;
  return static_cast<uint32_t>(value);
}

// kLanes integers as bytes, `step` bytes between runs of four.
GEMQ_INLINE void store_fours(int8_t* to, Int value, int step) {
  const Small bytes = __builtin_convertvector(value, Small);
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 4; ++i) {
    __builtin_memcpy(to + i * step, reinterpret_cast<const char*>(&bytes) + 4 * i, 4);
  }
}

// q = x / scale to the nearest integer, with scale = max|x| / 127, or / 32512 = 127 * 256 when there are two
// bytes; |x - scale * q| <= scale / 2. A group that is not finite gets a NaN scale, and so NaN products; one
// below 2^-100 counts as zero, where 1 / scale would overflow.
template <int TERMS>
void quantize_group(const float* x, int group_size, int8_t* q, float* scale, float* total) {
  constexpr float kSteps = TERMS == 2 ? 32512.0f : 127.0f;
  const uint32_t size = largest(x, group_size);
  const bool finite = size < 0x7f800000u, tiny = size < 0x0d800000u;
  const float most = bits_float(size);
  const float inverse = finite && !tiny ? kSteps / most : 0.0f;
  Int sums = {};
  for (int i = 0; i < group_size; i += kLanes) {
    const Float scaled = finite ? load<Float>(x + i) * inverse : Float{};
    const Int whole = (Int)(scaled + kRounder) - 0x4b400000;
    sums += whole;
    if constexpr (TERMS == 2) {
      const Int upper = (whole + 128) >> 8;
      store_fours(q + 2 * i, upper, 8);
      store_fours(q + 2 * i + 4, whole - (upper << 8), 8);
    } else {
      store_fours(q + i, whole, 4);
    }
  }
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  *scale = finite ? (tiny ? 0.0f : most / kSteps) : bits_float(0x7fc00000u);
  *total = *scale * static_cast<float>(sum);
}

void quantize(const float* x, int group_size, int terms, int8_t* q, float* scale, float* sum) {
  terms == 2 ? quantize_group<2>(x, group_size, q, scale, sum)
             : quantize_group<1>(x, group_size, q, scale, sum);
}

void silu_mul(const float* gate, const float* up, float* out, int blocks) {
  for (int i = 0; i < kRows * blocks; i += kLanes) {
    const Float g = load<Float>(gate + i);
    store(out + i, g / (exp_float(-g) + 1.0f) * load<Float>(up + i));
  }
}

void activate(const Activation& how, const float* gate, const float* up, float* out, int blocks) {
  if (how.silu()) return silu_mul(gate, up, out, blocks);
  const Float limit = Float{} + how.limit;
  for (int i = 0; i < kRows * blocks; i += kLanes) {
    Float g = load<Float>(gate + i);
    if (!how.gated) {
      // comparisons that keep a NaN
      g = g < 0.0f ? Float{} : g;
      store(out + i, g * g);
      continue;
    }
    Float u = load<Float>(up + i);
    g = g > limit ? limit : g;
    u = u > limit ? limit : u;
    u = u < -limit ? -limit : u;
    store(out + i, g / (exp_float(-g * (how.slope + how.cubic * g * g)) + 1.0f) * (u + how.shift));
  }
}

void add_scaled(const float* values, float weight, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] += weight * values[i];
}

void widen(const void* x, Element type, int64_t count, float* out) {
  const auto* at = static_cast<const uint16_t*>(x);
  int64_t i = 0;
  if (type == kElementBFloat16) {
    for (; i < count; ++i) out[i] = bits_float(static_cast<uint32_t>(at[i]) << 16);
    return;
  }
  for (; i + kLanes <= count; i += kLanes) store(out + i, load_half(at + i));
  for (; i < count; ++i) out[i] = half_to_float(at[i]);
}

void narrow(const float* x, int64_t count, Element type, void* out) {
  auto* at = static_cast<uint16_t*>(out);
  int64_t i = 0;
  if (type == kElementBFloat16) {
    for (; i < count; ++i) at[i] = float_to_bf16(x[i]);
    return;
  }
#if defined(__AVX512F__)
  for (; i + kLanes <= count; i += kLanes) {
    store(at + i, _mm512_cvtps_ph((__m512)load<Float>(x + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__F16C__)
  for (; i + kLanes <= count; i += kLanes) {
    store(at + i, _mm256_cvtps_ph((__m256)load<Float>(x + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
  for (; i < count; ++i) at[i] = float_to_half(x[i]);
}

}  // namespace

namespace GEMQ_VARIANT {
void exact_product(const BlockArgs& args, float* out);    // exact.cpp
void integer_product(const BlockArgs& args, float* out);  // integer.cpp
void gptq_rows(const GptqRows& args);                     // gptq/column_loop_vectors.cpp
void descend_codes(const CodeDescentRows& args);          // gptq/descent_vectors.cpp
void dense_product(const DenseArgs& args, float* out);    // decode/step_vectors.cpp
void attend(const AttendArgs& args);
void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* out);
void rotate(const float* x, const float* cosines, const float* sines, int rotary, int dim, float* out);
void gate(const float* gate, bool silu, int64_t count, float* out);  // decode/recurrent_vectors.cpp
void convolve(const ConvolveArgs& args);
void delta_rule(const DeltaArgs& args);
void state_space(const StateSpaceArgs& args);
}  // namespace GEMQ_VARIANT

#ifdef __AVX2__
#define GEMQ_INTEGER_PRODUCT GEMQ_VARIANT::integer_product
#else
#define GEMQ_INTEGER_PRODUCT nullptr
#endif
#define GEMQ_TEXT_OF(name) #name
#define GEMQ_TEXT(name) GEMQ_TEXT_OF(name)
extern const Kernels GEMQ_KERNELS;
const Kernels GEMQ_KERNELS = {GEMQ_TEXT(GEMQ_VARIANT),
                              GEMQ_VARIANT::exact_product,
                              GEMQ_INTEGER_PRODUCT,
                              group_sum,
                              quantize,
                              silu_mul,
                              activate,
                              add_scaled,
                              widen,
                              narrow,
                              GEMQ_VARIANT::gptq_rows,
                              GEMQ_VARIANT::descend_codes,
                              GEMQ_VARIANT::dense_product,
                              GEMQ_VARIANT::attend,
                              GEMQ_VARIANT::rms_norm,
                              GEMQ_VARIANT::rotate,
                              GEMQ_VARIANT::gate,
                              GEMQ_VARIANT::convolve,
                              GEMQ_VARIANT::delta_rule,
                              GEMQ_VARIANT::state_space};

}  // namespace gemq
