// The vector kernels: one text (kernels.cpp), compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "gptq/group.h"

namespace gemq {

// One block of 16 rows of a cpu_tile matrix against some rows of x.
struct BlockArgs {
  const uint8_t* codes;  // the block's
  const uint16_t* meta;
  int bits, k, group_size;
  const float* x;       // [*, k]
  const float* sums;    // [*, k / group_size], sums of x over each group
  const int32_t* rows;  // the rows of x and of sums to use
  int count;
};

struct Kernels {
  const char* name;
  // out[count][16]
  void (*block_product)(const BlockArgs& args, float* out);
  // sums[k / group_size] of one row of x
  void (*group_sums)(const float* x, int k, int group_size, float* sums);
  // out[16 * i] = silu(gate) * up for `blocks` runs of 16 contiguous values
  void (*silu_mul)(const float* gate, const float* up, float* out, int blocks);
  // GPTQ's column loop in one group of up to 16 rows
  void (*gptq_rows)(const GptqRows& args);
};

#ifdef GEMQ_X86
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
#endif
extern const Kernels kPortableKernels;

// The variant in use: GEMQ_CPU_ISA or the best one this CPU runs. Throws std::invalid_argument when
// GEMQ_CPU_ISA names one that it does not.
const Kernels& kernels();

// Switches to `name` ("avx512", "avx2", "portable"); throws std::invalid_argument if this CPU cannot run it.
void set_kernels(const char* name);

}  // namespace gemq
