#include "bind_moe.h"

#include <limits>
#include <string>

#include "checks.h"
#include "gemq/layouts.h"
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

void bind_moe_gemm(const MoeGemmCall& c) {
  check_tokens(c.tokens, c.top_k, c.num_experts, c.threads);
  check_groups("group_size", c.group_size, "k", c.k);
  check_range("n", c.n, 1, std::numeric_limits<int32_t>::max());
  const Element element = check_type(c.type);
  const Precision rounding = check_precision(c.precision);
  const Stack checked = check_stack("weight", c.stack, c.num_experts, c.n, c.k, c.group_size);
  if (c.tokens == 0) return;
  check_pointer("x", c.x);
  check_pointer("topk_ids", c.topk_ids);
  check_pointer("out", c.out);
  moe_gemm_cpu({as<const void>(c.x), c.x_per_slot, checked, c.num_experts, as<const int64_t>(c.topk_ids),
                as<const float>(c.topk_weights), as<void>(c.out), c.tokens, c.top_k, c.k, c.n, c.group_size,
                element, rounding},
               c.threads);
}

void bind_moe_ffn(const MoeFfnCall& c) {
  check_tokens(c.tokens, c.top_k, c.num_experts, c.threads);
  check_groups("group_size", c.group_size, "hidden", c.hidden);
  check_groups("down_group_size", c.down_group_size, "intermediate", c.intermediate);
  const Element element = check_type(c.type);
  const Precision rounding = check_precision(c.precision);
  const Stack first =
      check_stack("gate_up", c.gate_up, c.num_experts,
                  (c.gated ? 2 : 1) * static_cast<int64_t>(c.intermediate), c.hidden, c.group_size);
  const Stack second =
      check_stack("down", c.down, c.num_experts, c.hidden, c.intermediate, c.down_group_size);
  if (c.tokens == 0) return;
  check_pointer("x", c.x);
  check_pointer("topk_ids", c.topk_ids);
  check_pointer("topk_weights", c.topk_weights);
  check_pointer("out", c.out);
  moe_ffn_cpu({as<const void>(c.x),
               first,
               second,
               c.num_experts,
               as<const int64_t>(c.topk_ids),
               as<const float>(c.topk_weights),
               as<void>(c.out),
               c.tokens,
               c.top_k,
               c.hidden,
               c.intermediate,
               c.group_size,
               c.down_group_size,
               element,
               rounding,
               {c.gated, c.slope, c.cubic, c.limit, c.shift},
               as<const float>(c.gate_up_bias),
               as<const float>(c.down_bias)},
              c.threads);
}

void bind_lowbit_gemm(const DenseCall& c) {
  check_tokens(c.tokens, 1, 1, c.threads);
  check_groups("group_size", c.group_size, "k", c.k);
  check_range("bits", c.bits, 0, kMaxBits);
  check_at_least("n", c.n, 1);
  const Element element = check_type(c.type);
  const Precision rounding = check_precision(c.precision);
  if (c.tokens == 0) return;
  check_pointer("x", c.x);
  check_pointer("out", c.out);
  if (c.bits > 0) {
    check_pointer("qweight", c.qweight);
    check_pointer("meta", c.meta);
  }
  lowbit_gemm_cpu(as<const void>(c.x), as<const uint8_t>(c.qweight), as<const uint16_t>(c.meta),
                  as<void>(c.out), c.tokens, c.k, c.n, c.bits, c.group_size, element, rounding, c.threads);
}

}  // namespace gemq
