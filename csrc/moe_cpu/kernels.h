// The vector kernels: one text, compiled once for each instruction set.
#pragma once

#include <cmath>
#include <cstdint>

#include "decode/kernels.h"
#include "gemq/element.h"
#include "gptq/descent.h"
#include "gptq/group.h"

namespace gemq {

// What the products read of the activations; a row is a token, or a (token, slot) pair.
struct RowsView {
  const float* x;  // [*, k]; null for integers
  // x = scale * q, q of 8 bits in one byte, or of 16 in two: 256 * high + low. Four columns of high bytes,
  // then the same four of low ones, then the next four columns.
  const int8_t* q;  // [k / group_size, rows, group_size / 4, terms, 4]
  int terms;
  const float* scales;  // [k / group_size, rows]
  const float* sums;    // [k / group_size, rows]: of x over each group, as the integers give it
  int64_t rows;
  const int32_t* index;  // the rows to use
  int count;
};

// Blocks a call: 8 for up to 3 tokens, else 4, so that a group of the tokens' activations stays in the
// nearest cache.
constexpr int kFewTokens = 3;
constexpr int kManyBlocks = 8;
constexpr int kSomeBlocks = 4;

// Blocks of 16 rows of a cpu_tile matrix that follow each other, against some rows of activations.
struct BlockArgs {
  const uint8_t* codes;  // the first block's
  const uint16_t* meta;
  int bits, k, group_size;
  int blocks;  // see kManyBlocks and kSomeBlocks
  RowsView rows;
};

// What stands between the two products of an expert. Gated: g * sigmoid(g * (slope + cubic * g^2)) * (u +
// shift), with g = min(gate, limit) and u = up within +-limit; these numbers are SiLU's. Not gated:
// max(up, 0)^2.
struct Activation {
  bool gated = true;
  float slope = 1, cubic = 0, limit = INFINITY, shift = 0;
  bool silu() const { return gated && slope == 1 && cubic == 0 && limit == INFINITY && shift == 0; }
};

struct Kernels {
  const char* name;
  // out[blocks][count][16], with activations in float32
  void (*exact_product)(const BlockArgs& args, float* out);
  // The same with integers; null in a variant that gains nothing from them.
  void (*integer_product)(const BlockArgs& args, float* out);
  float (*group_sum)(const float* x, int group_size);
  // One group to integers of one or two bytes, with their scale and sum
  void (*quantize)(const float* x, int group_size, int terms, int8_t* q, float* scale, float* sum);
  // out[16 * i] = silu(gate) * up for `blocks` runs of 16 contiguous values
  void (*silu_mul)(const float* gate, const float* up, float* out, int blocks);
  // The same runs through any activation; `up` is not read by one that is not gated
  void (*activate)(const Activation& how, const float* gate, const float* up, float* out, int blocks);
  // out += weight * values
  void (*add_scaled)(const float* values, float weight, int count, float* out);
  void (*widen)(const void* x, Element type, int64_t count, float* out);
  void (*narrow)(const float* x, int64_t count, Element type, void* out);
  // GPTQ's column loop in one group of up to 16 rows
  void (*gptq_rows)(const GptqRows& args);
  // Coordinate descent over the codes of one group of up to 16 rows
  void (*descend_codes)(const CodeDescentRows& args);
  // A decode step's, see decode/kernels.h
  void (*dense_product)(const DenseArgs& args, float* out);
  void (*attend)(const AttendArgs& args);
  // out = weight * x / sqrt(mean(x^2) + eps); out may be x
  void (*rms_norm)(const float* x, const float* weight, int64_t count, float eps, float* out);
  // The first `rotary` of `dim` numbers turned by halves: x * cosines + (halves exchanged) * sines
  void (*rotate)(const float* x, const float* cosines, const float* sines, int rotary, int dim, float* out);
  // out *= sigmoid(gate), or SiLU(gate)
  void (*gate)(const float* gate, bool silu, int64_t count, float* out);
  void (*convolve)(const ConvolveArgs& args);
  void (*delta_rule)(const DeltaArgs& args);
  void (*state_space)(const StateSpaceArgs& args);
};

#ifdef GEMQ_X86
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2VnniKernels;
extern const Kernels kAvx2Kernels;
#endif
extern const Kernels kPortableKernels;

// The variant in use: GEMQ_CPU_ISA or the best one this CPU runs. Throws std::invalid_argument when
// GEMQ_CPU_ISA names one that it does not.
const Kernels& kernels();

// Switches to `name` ("avx512vnni", "avx512", "avx2vnni", "avx2", "portable"); throws std::invalid_argument
// if this CPU cannot run it.
void set_kernels(const char* name);

}  // namespace gemq
