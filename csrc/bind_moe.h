#pragma once

#include <cstdint>
#include <string>

#include "moe_cpu/moe.h"

namespace gemq {

// The packed experts of one projection, as addresses and sizes of the five tensors of a stack.
struct StackAddress {
  uintptr_t codes, meta, bits, offsets, meta_offsets;
  int64_t code_bytes, meta_elements;
};

// The stack behind the addresses, each expert n x k, named in messages with `name`. Every expert must lie
// inside the buffers, which may be null when none stores anything.
Stack check_stack(const std::string& name, const StackAddress& at, int num_experts, int64_t n, int64_t k,
                  int group_size);
Element check_type(int type);
Precision check_precision(int precision);

void bind_moe_gemm(uintptr_t x, bool x_per_slot, const StackAddress& stack, int num_experts,
                   uintptr_t topk_ids, uintptr_t topk_weights, uintptr_t out, int64_t tokens, int top_k,
                   int k, int64_t n, int group_size, int type, int precision, int threads);
void bind_moe_ffn(uintptr_t x, const StackAddress& gate_up, const StackAddress& down, int num_experts,
                  uintptr_t topk_ids, uintptr_t topk_weights, uintptr_t out, int64_t tokens, int top_k,
                  int hidden, int intermediate, int group_size, int down_group_size, int type, int precision,
                  int threads);
void bind_lowbit_gemm(uintptr_t x, uintptr_t qweight, uintptr_t meta, uintptr_t out, int64_t tokens, int k,
                      int64_t n, int bits, int group_size, int type, int precision, int threads);

}  // namespace gemq
