#pragma once

#include <cstdint>

namespace gemq {

// The packed experts of one projection, as addresses and sizes of the five tensors of a stack.
struct StackAddress {
  uintptr_t codes, meta, bits, offsets, meta_offsets;
  int64_t code_bytes, meta_elements;
};

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
