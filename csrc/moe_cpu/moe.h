// Products of packed experts (cpu_tile layout) on the CPU. Arguments are validated by the bindings.
#pragma once

#include "moe_cpu/activations.h"

namespace gemq {

// A stack of packed matrices; all tables have one entry an expert.
struct Stack {
  const uint8_t* codes;
  const uint16_t* meta;
  const int32_t* bits;
  const int64_t* code_offsets;  // bytes
  const int64_t* meta_offsets;  // float16 elements
};

struct MoeGemmArgs {
  const void* x;  // [tokens, k], or [tokens, top_k, k] when x_per_slot
  bool x_per_slot;
  Stack stack;
  int num_experts;
  const int64_t* topk_ids;    // [tokens, top_k]; ids outside 0..num_experts-1 contribute zero
  const float* topk_weights;  // [tokens, top_k], or null
  void* out;                  // [tokens, top_k, n], or [tokens, n] when topk_weights is given
  int64_t tokens;
  int top_k, k;
  int64_t n;
  int group_size;
  Element type;  // of x and out
  Precision precision;
};

struct MoeFfnArgs {
  const void* x;  // [tokens, hidden]
  Stack gate_up;  // 2 * intermediate rows of hidden: the gate's, then up's; without a gate, up's alone
  Stack down;     // hidden rows of intermediate
  int num_experts;
  const int64_t* topk_ids;
  const float* topk_weights;
  void* out;  // [tokens, hidden]
  int64_t tokens;
  int top_k, hidden, intermediate;
  int group_size, down_group_size;
  Element type;  // of x and out
  Precision precision;
  Activation activation;
  const float* gate_up_bias;  // [num_experts, rows of gate_up], or null
  const float* down_bias;     // [num_experts, hidden], or null
};

void moe_gemm_cpu(const MoeGemmArgs& args, int threads);
void moe_ffn_cpu(const MoeFfnArgs& args, int threads);

// x [tokens, k] times one packed matrix of n rows: out [tokens, n].
void lowbit_gemm_cpu(const void* x, const uint8_t* codes, const uint16_t* meta, void* out, int64_t tokens,
                     int k, int64_t n, int bits, int group_size, Element type, Precision precision,
                     int threads);

}  // namespace gemq
