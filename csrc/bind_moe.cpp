#include "bind_moe.h"

#include <algorithm>

#include "checks.h"
#include "gemq/bits.h"
#include "moe_cpu/moe.h"

namespace gemq {
namespace {

template <class T>
T* as(uintptr_t pointer) {
  return reinterpret_cast<T*>(pointer);
}

// The stack behind five addresses, named in messages with `prefix`. The buffers may be null when no expert
// stores anything.
Stack check_stack(const std::string& prefix, uintptr_t codes, uintptr_t meta, uintptr_t bits,
                  uintptr_t offsets, uintptr_t meta_offsets, int num_experts) {
  const Stack stack{as<const uint8_t>(codes), as<const uint16_t>(meta), as<const int32_t>(bits),
                    as<const int64_t>(offsets), as<const int64_t>(meta_offsets)};
  if (num_experts == 0) return stack;
  check_pointer((prefix + "bits").c_str(), bits);
  check_pointer((prefix + "offsets").c_str(), offsets);
  check_pointer((prefix + "meta_offsets").c_str(), meta_offsets);
  bool stores = false;
  for (int e = 0; e < num_experts; ++e) {
    check_range(prefix + "bits[" + std::to_string(e) + "]", stack.bits[e], 0, kMaxBits);
    if (stack.bits[e] == 0) continue;
    stores = true;
    check_at_least((prefix + "offsets[" + std::to_string(e) + "]").c_str(), stack.code_offsets[e], 0);
    check_at_least((prefix + "meta_offsets[" + std::to_string(e) + "]").c_str(), stack.meta_offsets[e], 0);
  }
  if (stores) {
    check_pointer((prefix + "qweight").c_str(), codes);
    check_pointer((prefix + "meta").c_str(), meta);
  }
  return stack;
}

void check_tokens(int64_t tokens, int top_k, int num_experts, int threads) {
  check_at_least("num_experts", num_experts, 0);
  check_at_least("top_k", top_k, 1);
  check_at_least("tokens", tokens, 0);
  check_int32("tokens * top_k", tokens * top_k);
  check_threads(threads);
}

}  // namespace

void bind_moe_gemm(uintptr_t x, bool x_per_slot, uintptr_t qweight, uintptr_t meta, uintptr_t expert_bits,
                   uintptr_t expert_offsets, uintptr_t meta_offsets, int num_experts, uintptr_t topk_ids,
                   uintptr_t topk_weights, uintptr_t out, int64_t tokens, int top_k, int k, int64_t n,
                   int group_size, int threads) {
  check_tokens(tokens, top_k, num_experts, threads);
  check_groups("group_size", group_size, "k", k);
  check_at_least("n", n, 1);
  const Stack stack =
      check_stack("expert_", qweight, meta, expert_bits, expert_offsets, meta_offsets, num_experts);
  if (tokens == 0) return;
  check_pointer("x", x);
  check_pointer("topk_ids", topk_ids);
  check_pointer("out", out);
  moe_gemm_cpu({as<const float>(x), x_per_slot, stack, num_experts, as<const int64_t>(topk_ids),
                as<const float>(topk_weights), as<float>(out), tokens, top_k, k, n, group_size},
               threads);
}

void bind_moe_ffn(uintptr_t x, uintptr_t gate_up_qweight, uintptr_t gate_up_meta, uintptr_t gate_up_bits,
                  uintptr_t gate_up_offsets, uintptr_t gate_up_meta_offsets, uintptr_t down_qweight,
                  uintptr_t down_meta, uintptr_t down_bits, uintptr_t down_offsets,
                  uintptr_t down_meta_offsets, int num_experts, uintptr_t topk_ids, uintptr_t topk_weights,
                  uintptr_t out, uintptr_t scratch, int64_t tokens, int top_k, int hidden, int intermediate,
                  int group_size, int down_group_size, int threads) {
  check_tokens(tokens, top_k, num_experts, threads);
  check_groups("group_size", group_size, "hidden", hidden);
  check_groups("down_group_size", down_group_size, "intermediate", intermediate);
  const Stack gate_up = check_stack("gate_up_", gate_up_qweight, gate_up_meta, gate_up_bits, gate_up_offsets,
                                    gate_up_meta_offsets, num_experts);
  const Stack down =
      check_stack("down_", down_qweight, down_meta, down_bits, down_offsets, down_meta_offsets, num_experts);
  if (tokens == 0) return;
  check_pointer("x", x);
  check_pointer("topk_ids", topk_ids);
  check_pointer("topk_weights", topk_weights);
  check_pointer("out", out);
  check_pointer("scratch", scratch);
  moe_ffn_cpu({as<const float>(x), gate_up, down, num_experts, as<const int64_t>(topk_ids),
               as<const float>(topk_weights), as<float>(out), as<float>(scratch), tokens, top_k, hidden,
               intermediate, group_size, down_group_size},
              threads);
}

void bind_lowbit_gemm(uintptr_t x, uintptr_t qweight, uintptr_t meta, uintptr_t out, int64_t tokens, int k,
                      int64_t n, int bits, int group_size, int threads) {
  check_tokens(tokens, 1, 1, threads);
  check_groups("group_size", group_size, "k", k);
  check_range("bits", bits, 0, kMaxBits);
  check_at_least("n", n, 1);
  if (tokens == 0) return;
  check_pointer("x", x);
  check_pointer("out", out);
  if (bits > 0) {
    check_pointer("qweight", qweight);
    check_pointer("meta", meta);
  }
  lowbit_gemm_cpu(as<const float>(x), as<const uint8_t>(qweight), as<const uint16_t>(meta), as<float>(out),
                  tokens, k, n, bits, group_size, threads);
}

}  // namespace gemq
