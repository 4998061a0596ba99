#pragma once

#include <cstdint>

namespace gemq {

void bind_moe_gemm(uintptr_t x, bool x_per_slot, uintptr_t qweight, uintptr_t meta, uintptr_t expert_bits,
                   uintptr_t expert_offsets, uintptr_t meta_offsets, int num_experts, uintptr_t topk_ids,
                   uintptr_t topk_weights, uintptr_t out, int64_t tokens, int top_k, int k, int64_t n,
                   int group_size, int threads);
void bind_moe_ffn(uintptr_t x, uintptr_t gate_up_qweight, uintptr_t gate_up_meta, uintptr_t gate_up_bits,
                  uintptr_t gate_up_offsets, uintptr_t gate_up_meta_offsets, uintptr_t down_qweight,
                  uintptr_t down_meta, uintptr_t down_bits, uintptr_t down_offsets,
                  uintptr_t down_meta_offsets, int num_experts, uintptr_t topk_ids, uintptr_t topk_weights,
                  uintptr_t out, uintptr_t scratch, int64_t tokens, int top_k, int hidden, int intermediate,
                  int group_size, int down_group_size, int threads);
void bind_lowbit_gemm(uintptr_t x, uintptr_t qweight, uintptr_t meta, uintptr_t out, int64_t tokens, int k,
                      int64_t n, int bits, int group_size, int threads);

}  // namespace gemq
