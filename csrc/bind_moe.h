// Products of packed experts at the border to Python: addresses and sizes in, checked.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "fields.h"
#include "moe_cpu/moe.h"

namespace gemq {

// The packed experts of one projection, as addresses and sizes of the five tensors of a stack.
struct StackAddress {
  uintptr_t codes, meta, bits, offsets, meta_offsets;
  int64_t code_bytes, meta_elements;
  static constexpr auto fields() {
    using C = StackAddress;
    return std::make_tuple(field("codes", &C::codes), field("meta", &C::meta), field("bits", &C::bits),
                           field("offsets", &C::offsets), field("meta_offsets", &C::meta_offsets),
                           field("code_bytes", &C::code_bytes), field("meta_elements", &C::meta_elements));
  }
};

// The stack behind the addresses, each expert n x k, named in messages with `name`. Every expert must lie
// inside the buffers, which may be null when none stores anything.
Stack check_stack(const std::string& name, const StackAddress& at, int num_experts, int64_t n, int64_t k,
                  int group_size);
Element check_type(int type);
Precision check_precision(int precision);

// As MoeGemmArgs, with numbers for Element and Precision; no topk_weights is 0.
struct MoeGemmCall {
  uintptr_t x;
  bool x_per_slot;
  StackAddress stack;
  int num_experts;
  uintptr_t topk_ids, topk_weights, out;
  int64_t tokens;
  int top_k, k;
  int64_t n;
  int group_size, type, precision, threads = 1;
  static constexpr auto fields() {
    using C = MoeGemmCall;
    return std::make_tuple(field("x", &C::x), field("x_per_slot", &C::x_per_slot), field("stack", &C::stack),
                           field("num_experts", &C::num_experts), field("topk_ids", &C::topk_ids),
                           field("topk_weights", &C::topk_weights), field("out", &C::out),
                           field("tokens", &C::tokens), field("top_k", &C::top_k), field("k", &C::k),
                           field("n", &C::n), field("group_size", &C::group_size), field("type", &C::type),
                           field("precision", &C::precision), optional_field("threads", &C::threads));
  }
};

struct MoeFfnCall {
  uintptr_t x;
  StackAddress gate_up, down;
  int num_experts;
  uintptr_t topk_ids, topk_weights, out;
  int64_t tokens;
  int top_k, hidden, intermediate, group_size, down_group_size, type, precision, threads = 1;
  bool gated = true;
  float slope = 1, cubic = 0, limit = INFINITY, shift = 0;  // see Activation
  uintptr_t gate_up_bias = 0, down_bias = 0;                // float32, or 0 without
  static constexpr auto fields() {
    using C = MoeFfnCall;
    return std::make_tuple(
        field("x", &C::x), field("gate_up", &C::gate_up), field("down", &C::down),
        field("num_experts", &C::num_experts), field("topk_ids", &C::topk_ids),
        field("topk_weights", &C::topk_weights), field("out", &C::out), field("tokens", &C::tokens),
        field("top_k", &C::top_k), field("hidden", &C::hidden), field("intermediate", &C::intermediate),
        field("group_size", &C::group_size), field("down_group_size", &C::down_group_size),
        field("type", &C::type), field("precision", &C::precision), optional_field("threads", &C::threads),
        optional_field("gated", &C::gated), optional_field("slope", &C::slope),
        optional_field("cubic", &C::cubic), optional_field("limit", &C::limit),
        optional_field("shift", &C::shift), optional_field("gate_up_bias", &C::gate_up_bias),
        optional_field("down_bias", &C::down_bias));
  }
};

// One matrix, n x k.
struct DenseCall {
  uintptr_t x, qweight, meta, out;
  int64_t tokens;
  int k;
  int64_t n;
  int bits, group_size, type, precision, threads = 1;
  static constexpr auto fields() {
    using C = DenseCall;
    return std::make_tuple(field("x", &C::x), field("qweight", &C::qweight), field("meta", &C::meta),
                           field("out", &C::out), field("tokens", &C::tokens), field("k", &C::k),
                           field("n", &C::n), field("bits", &C::bits), field("group_size", &C::group_size),
                           field("type", &C::type), field("precision", &C::precision),
                           optional_field("threads", &C::threads));
  }
};

void bind_moe_gemm(const MoeGemmCall& c);
void bind_moe_ffn(const MoeFfnCall& c);
void bind_lowbit_gemm(const DenseCall& c);

}  // namespace gemq
