// Attention of the new tokens over a static cache or a window: grouped heads, rotary halves, optional norms
// of every head, gates and sinks.
#pragma once

#include <vector>

#include "decode/kv_chunks.h"

namespace gemq {

struct AttentionShape {
  int heads, groups, dim;  // query heads, key and value heads, numbers a head
  bool gated;              // each query head is followed by a gate, whose sigmoid its output is multiplied by
  int rotary;              // numbers of a head that turn; 0 for none
  const float* cosines;    // [positions, rotary]
  const float* sines;      // [positions, rotary], the first half negated
  int64_t positions;       // rows of these tables
  void *keys, *values;     // [batch, groups, slots, dim]
  Element type;            // of keys and values
  int64_t slots;
  bool window;  // the slots hold the newest tokens in turn, see KvChunks
  float scale;
  std::vector<float> query_norm, key_norm, value_norm;  // [dim] each, or empty
  float eps;
  std::vector<float> sinks;  // [heads]: a score beside those of the keys; or empty

  int query_dim() const { return gated ? 2 * dim : dim; }
};

class Attend : public Operation {
public:
  Attend(const Kernels& kernels, ChunkMemory& memory, const Rows& query, const Rows& key, const Rows& value,
         Rows& out, AttentionShape shape);
  const char* name() const override { return "attend"; }
  void reset(const StepInput& step, int threads) override;
  void run(const StepInput& step, Team team, float* scratch) override;
  int64_t scratch_floats() const override;

private:
  int heads_a_group() const { return shape_.heads / shape_.groups; }
  void attend_chunk(const StepInput& step, int64_t item, float* scratch);
  void store_new(const StepInput& step, int64_t row, int group, float* scratch);

  const Kernels& kernels_;
  const Rows &query_, &key_, &value_;
  Rows& out_;
  AttentionShape shape_;
  KvChunks chunks_;
  Phase parts_;
};

}  // namespace gemq
