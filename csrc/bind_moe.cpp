#include "bind_moe.h"

#include <limits>
#include <string>

#include "checks.h"
#include "gemq/tiles.h"
#include "moe_cpu/moe.h"

namespace gemq {
namespace {

template <class T>
T* as(uintptr_t pointer) {
  return reinterpret_cast<T*>(pointer);
}

void check_tokens(int64_t tokens, int top_k, int num_experts, int threads) {
  check_at_least("num_experts", num_experts, 0);
  check_at_least("top_k", top_k, 1);
  check_at_least("tokens", tokens, 0);
  check_int32("tokens * top_k", tokens * top_k);
  check_threads(threads);
}

}  // namespace

Stack check_stack(const std::string& name, const StackAddress& at, int num_experts, int64_t n, int64_t k,
                  int group_size) {
  const Stack stack{as<const uint8_t>(at.codes), as<const uint16_t>(at.meta), as<const int32_t>(at.bits),
                    as<const int64_t>(at.offsets), as<const int64_t>(at.meta_offsets)};
  if (num_experts == 0) return stack;
  check_pointer((name + " expert_bits").c_str(), at.bits);
  check_pointer((name + " expert_offsets").c_str(), at.offsets);
  check_pointer((name + " meta_offsets").c_str(), at.meta_offsets);
  const int64_t rows = ceil_div(n, kCpuRows) * kCpuRows, meta_size = rows * (k / group_size) * 2;
  bool stores = false;
  for (int e = 0; e < num_experts; ++e) {
    const int bits = stack.bits[e];
    const std::string which = "[" + std::to_string(e) + "]";
    if (bits < 0 || bits > kMaxBits) {
      bad_value(name + " expert_bits" + which, bits, "an integer in 0.." + std::to_string(kMaxBits));
    }
    if (bits == 0) continue;
    stores = true;
    const auto inside = [&](const char* table, const char* buffer, int64_t offset, int64_t held,
                            int64_t size) {
      if (offset >= 0 && size <= held && offset <= held - size) return;
      throw std::invalid_argument(
          name + " " + table + which + " is " + std::to_string(offset) + ", where the " + std::to_string(n) +
          " x " + std::to_string(k) + " of expert " + std::to_string(e) + " at " + std::to_string(bits) +
          " bits in cpu_tile are not inside the " + std::to_string(held) + " elements of " + buffer);
    };
    inside("expert_offsets", "qweight", stack.code_offsets[e], at.code_bytes, rows * k / 8 * bits);
    inside("meta_offsets", "meta", stack.meta_offsets[e], at.meta_elements, meta_size);
  }
  if (stores) {
    check_pointer((name + " qweight").c_str(), at.codes);
    check_pointer((name + " meta").c_str(), at.meta);
  }
  return stack;
}

Element check_type(int type) {
  check_range("type", type, kElementFloat32, kElementBFloat16);
  return static_cast<Element>(type);
}

Precision check_precision(int precision) {
  check_range("precision", precision, kExact, kInt8);
  return static_cast<Precision>(precision);
}

void bind_moe_gemm(uintptr_t x, bool x_per_slot, const StackAddress& stack, int num_experts,
                   uintptr_t topk_ids, uintptr_t topk_weights, uintptr_t out, int64_t tokens, int top_k,
                   int k, int64_t n, int group_size, int type, int precision, int threads) {
  check_tokens(tokens, top_k, num_experts, threads);
  check_groups("group_size", group_size, "k", k);
  check_range("n", n, 1, std::numeric_limits<int32_t>::max());
  const Element element = check_type(type);
  const Precision rounding = check_precision(precision);
  const Stack checked = check_stack("weight", stack, num_experts, n, k, group_size);
  if (tokens == 0) return;
  check_pointer("x", x);
  check_pointer("topk_ids", topk_ids);
  check_pointer("out", out);
  moe_gemm_cpu(
      {as<const void>(x), x_per_slot, checked, num_experts, as<const int64_t>(topk_ids),
       as<const float>(topk_weights), as<void>(out), tokens, top_k, k, n, group_size, element, rounding},
      threads);
}

void bind_moe_ffn(uintptr_t x, const StackAddress& gate_up, const StackAddress& down, int num_experts,
                  uintptr_t topk_ids, uintptr_t topk_weights, uintptr_t out, int64_t tokens, int top_k,
                  int hidden, int intermediate, int group_size, int down_group_size, int type, int precision,
                  int threads) {
  check_tokens(tokens, top_k, num_experts, threads);
  check_groups("group_size", group_size, "hidden", hidden);
  check_groups("down_group_size", down_group_size, "intermediate", intermediate);
  const Element element = check_type(type);
  const Precision rounding = check_precision(precision);
  const Stack first = check_stack("gate_up", gate_up, num_experts, 2 * static_cast<int64_t>(intermediate),
                                  hidden, group_size);
  const Stack second = check_stack("down", down, num_experts, hidden, intermediate, down_group_size);
  if (tokens == 0) return;
  check_pointer("x", x);
  check_pointer("topk_ids", topk_ids);
  check_pointer("topk_weights", topk_weights);
  check_pointer("out", out);
  moe_ffn_cpu({as<const void>(x), first, second, num_experts, as<const int64_t>(topk_ids),
               as<const float>(topk_weights), as<void>(out), tokens, top_k, hidden, intermediate, group_size,
               down_group_size, element, rounding},
              threads);
}

void bind_lowbit_gemm(uintptr_t x, uintptr_t qweight, uintptr_t meta, uintptr_t out, int64_t tokens, int k,
                      int64_t n, int bits, int group_size, int type, int precision, int threads) {
  check_tokens(tokens, 1, 1, threads);
  check_groups("group_size", group_size, "k", k);
  check_range("bits", bits, 0, kMaxBits);
  check_at_least("n", n, 1);
  const Element element = check_type(type);
  const Precision rounding = check_precision(precision);
  if (tokens == 0) return;
  check_pointer("x", x);
  check_pointer("out", out);
  if (bits > 0) {
    check_pointer("qweight", qweight);
    check_pointer("meta", meta);
  }
  lowbit_gemm_cpu(as<const void>(x), as<const uint8_t>(qweight), as<const uint16_t>(meta), as<void>(out),
                  tokens, k, n, bits, group_size, element, rounding, threads);
}

}  // namespace gemq
