// The decode program at the border to Python: addresses and sizes in, checked, operations out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bind_moe.h"
#include "decode/program.h"

namespace gemq {

// A linear layer: packed when bits is above 0, else elements of `type`. A bias is float32 [n], or 0.
struct MatrixAddress {
  uintptr_t weights, meta;
  int bits, group_size, type;
  int64_t n;
  uintptr_t bias;
  int out;
  static constexpr auto fields() {
    using C = MatrixAddress;
    return std::make_tuple(field("weights", &C::weights), field("meta", &C::meta), field("bits", &C::bits),
                           field("group_size", &C::group_size), field("type", &C::type), field("n", &C::n),
                           field("bias", &C::bias), field("out", &C::out));
  }
};

struct AttentionAddress {
  int query, key, value, out, heads, groups, dim, rotary;
  bool gated;
  uintptr_t cosines, sines;
  int64_t positions;
  uintptr_t keys, values;
  int type;
  int64_t slots;
  bool window;
  float scale;
  uintptr_t query_norm, key_norm, value_norm;
  float eps;
  uintptr_t sinks;
  static constexpr auto fields() {
    using C = AttentionAddress;
    return std::make_tuple(
        field("query", &C::query), field("key", &C::key), field("value", &C::value), field("out", &C::out),
        field("heads", &C::heads), field("groups", &C::groups), field("dim", &C::dim),
        field("rotary", &C::rotary), field("gated", &C::gated), field("cosines", &C::cosines),
        field("sines", &C::sines), field("positions", &C::positions), field("keys", &C::keys),
        field("values", &C::values), field("type", &C::type), field("slots", &C::slots),
        field("window", &C::window), field("scale", &C::scale), field("query_norm", &C::query_norm),
        field("key_norm", &C::key_norm), field("value_norm", &C::value_norm), field("eps", &C::eps),
        field("sinks", &C::sinks));
  }
};

// Numbers of key head j start at offset + j * stride of a row of the buffer.
struct PartAddress {
  int buffer;
  int64_t offset, stride;
  static constexpr auto fields() {
    using C = PartAddress;
    return std::make_tuple(field("buffer", &C::buffer), field("offset", &C::offset),
                           field("stride", &C::stride));
  }
};

struct DeltaAddress {
  PartAddress query, key, value, gate, beta, decay;
  int out, key_heads, value_heads, key_dim, value_dim, taps;
  uintptr_t weights, rate, offset, norm;
  float eps;
  uintptr_t past, state;
  static constexpr auto fields() {
    using C = DeltaAddress;
    return std::make_tuple(
        field("query", &C::query), field("key", &C::key), field("value", &C::value), field("gate", &C::gate),
        field("beta", &C::beta), field("decay", &C::decay), field("out", &C::out),
        field("key_heads", &C::key_heads), field("value_heads", &C::value_heads),
        field("key_dim", &C::key_dim), field("value_dim", &C::value_dim), field("taps", &C::taps),
        field("weights", &C::weights), field("rate", &C::rate), field("offset", &C::offset),
        field("norm", &C::norm), field("eps", &C::eps), field("past", &C::past), field("state", &C::state));
  }
};

struct MambaAddress {
  int projected, out, heads, dim, groups, states, taps;
  uintptr_t weights, bias, rate, offset, skip, norm;
  float eps;
  uintptr_t past, state;
  static constexpr auto fields() {
    using C = MambaAddress;
    return std::make_tuple(field("projected", &C::projected), field("out", &C::out),
                           field("heads", &C::heads), field("dim", &C::dim), field("groups", &C::groups),
                           field("states", &C::states), field("taps", &C::taps),
                           field("weights", &C::weights), field("bias", &C::bias), field("rate", &C::rate),
                           field("offset", &C::offset), field("skip", &C::skip), field("norm", &C::norm),
                           field("eps", &C::eps), field("past", &C::past), field("state", &C::state));
  }
};

struct LatentAddress {
  int query, latent, out, heads, nope, rope, rank, v_dim;
  uintptr_t into, from;
  int expand_type;
  uintptr_t norm;
  float eps;
  uintptr_t cosines, sines;
  int64_t positions;
  bool apart;
  uintptr_t latents, ropes;
  int type;
  int64_t slots;
  bool window;
  float scale;
  static constexpr auto fields() {
    using C = LatentAddress;
    return std::make_tuple(field("query", &C::query), field("latent", &C::latent), field("out", &C::out),
                           field("heads", &C::heads), field("nope", &C::nope), field("rope", &C::rope),
                           field("rank", &C::rank), field("v_dim", &C::v_dim), field("into", &C::into),
                           field("from_", &C::from), field("expand_type", &C::expand_type),
                           field("norm", &C::norm), field("eps", &C::eps), field("cosines", &C::cosines),
                           field("sines", &C::sines), field("positions", &C::positions),
                           field("apart", &C::apart), field("latents", &C::latents),
                           field("ropes", &C::ropes), field("type", &C::type), field("slots", &C::slots),
                           field("window", &C::window), field("scale", &C::scale));
  }
};

struct ExpertsAddress {
  int logits, x, out, top_k;
  bool sigmoid, normalize;
  float epsilon, scale;
  uintptr_t bias;
  int group_score, groups, kept_groups;
  uintptr_t expert_scale;
  StackAddress gate_up, down;
  int experts, intermediate, group_size, down_group_size;
  bool gated;
  float slope, cubic, limit, shift;
  uintptr_t gate_up_bias, down_bias;
  bool onto;
  static constexpr auto fields() {
    using C = ExpertsAddress;
    return std::make_tuple(
        field("logits", &C::logits), field("x", &C::x), field("out", &C::out), field("top_k", &C::top_k),
        field("sigmoid", &C::sigmoid), field("normalize", &C::normalize), field("epsilon", &C::epsilon),
        field("scale", &C::scale), field("bias", &C::bias), field("group_score", &C::group_score),
        field("groups", &C::groups), field("kept_groups", &C::kept_groups),
        field("expert_scale", &C::expert_scale), field("gate_up", &C::gate_up), field("down", &C::down),
        field("experts", &C::experts), field("intermediate", &C::intermediate),
        field("group_size", &C::group_size), field("down_group_size", &C::down_group_size),
        field("gated", &C::gated), field("slope", &C::slope), field("cubic", &C::cubic),
        field("limit", &C::limit), field("shift", &C::shift), field("gate_up_bias", &C::gate_up_bias),
        field("down_bias", &C::down_bias), field("onto", &C::onto));
  }
};

int bind_buffer(Program& program, int64_t width, uintptr_t external);
void bind_embed(Program& program, uintptr_t table, int type, int64_t tokens, float scale, int out);
void bind_embed_packed(Program& program, uintptr_t codes, uintptr_t meta, int bits, int group_size,
                       bool tiled, int64_t tokens, float scale, int out);
void bind_norm(Program& program, int x, uintptr_t weight, float eps, int out, bool onto, float scale);
void bind_activate(Program& program, int gate, int up, int out, bool gated, float slope, float cubic,
                   float limit, float shift);
void bind_linear(Program& program, int x, const std::vector<MatrixAddress>& matrices, bool onto, int gate);
void bind_attend(Program& program, const AttentionAddress& attention);
void bind_attend_latent(Program& program, const LatentAddress& attention);
void bind_delta_net(Program& program, const DeltaAddress& delta);
void bind_mamba(Program& program, const MambaAddress& mamba);
void bind_experts(Program& program, const ExpertsAddress& experts);
void bind_run(Program& program, uintptr_t tokens, uintptr_t positions, uintptr_t starts, int64_t slot,
              int threads);

}  // namespace gemq
