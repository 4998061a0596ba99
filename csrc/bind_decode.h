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
};

struct AttentionAddress {
  int query, key, value, out, heads, groups, dim, rotary;
  uintptr_t cosines, sines;
  int64_t positions;
  uintptr_t keys, values;
  int type;
  int64_t slots;
  float scale;
  uintptr_t query_norm, key_norm;
  float eps;
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
  float scale;
};

struct ExpertsAddress {
  int logits, x, out, top_k;
  bool sigmoid, normalize;
  float epsilon, scale;
  uintptr_t bias;
  int group_score, groups, kept_groups;
  StackAddress gate_up, down;
  int experts, intermediate, group_size, down_group_size;
};

int bind_buffer(Program& program, int64_t width, uintptr_t external);
void bind_embed(Program& program, uintptr_t table, int type, int64_t tokens, int out);
void bind_norm(Program& program, int x, uintptr_t weight, float eps, int out);
void bind_silu_mul(Program& program, int gate, int up, int out);
void bind_linear(Program& program, int x, const std::vector<MatrixAddress>& matrices, bool onto, int gate);
void bind_attend(Program& program, const AttentionAddress& attention);
void bind_attend_latent(Program& program, const LatentAddress& attention);
void bind_experts(Program& program, const ExpertsAddress& experts);
void bind_run(Program& program, uintptr_t tokens, uintptr_t positions, uintptr_t starts, int64_t slot,
              int threads);

}  // namespace gemq
