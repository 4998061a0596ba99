// DeepSeek's attention of the new tokens over the compressed cache: the expansion of keys is folded into the
// queries, that of values into the output, so a step reads rank + rope numbers a cached token.
#pragma once

#include <vector>

#include "decode/kv_chunks.h"

namespace gemq {

struct LatentShape {
  int heads, nope, rope, rank, v_dim;
  const void* into;  // [heads, rank, nope]: of keys, transposed
  const void* from;  // [heads, v_dim, rank]: of values
  Element expand_type;
  std::vector<float> norm;  // [rank], of new latents
  float eps;
  const float *cosines, *sines;  // [positions, rope / 2]
  int64_t positions;
  bool apart;             // turned pairs lie half the vector apart, else side by side
  void *latents, *ropes;  // [batch, slots, rank] and [batch, slots, rope]
  Element type;           // of the cache
  int64_t slots;
  bool window;  // see KvChunks
  float scale;
};

class AttendLatent : public Operation {
public:
  // query is [batch, heads * (nope + rope)], latent [batch, rank + rope], out [batch, heads * v_dim].
  AttendLatent(const Kernels& kernels, ChunkMemory& memory, const Rows& query, const Rows& latent, Rows& out,
               LatentShape shape);
  const char* name() const override { return "attend"; }
  void reset(const StepInput& step, int threads) override;
  void run(const StepInput& step, Team team, float* scratch) override;
  int64_t scratch_floats() const override;

private:
  // Heads that one item attends with: all of them read the same keys.
  static constexpr int kHeads = 4;
  int head_runs() const { return (shape_.heads + kHeads - 1) / kHeads; }
  int key_size() const { return shape_.rank + shape_.rope; }
  void fold(const StepInput& step, int head, float* scratch);
  void store_new(const StepInput& step, int64_t row, float* scratch);
  void attend_chunk(const StepInput& step, int64_t item, float* scratch);
  void expand(int head, float* scratch);
  void turn(const StepInput& step, int64_t row, const float* from, float* to) const;

  const Kernels& kernels_;
  const Rows &query_, &latent_;
  Rows& out_;
  LatentShape shape_;
  KvChunks chunks_;
  Rows folded_, contexts_;
  Phase folds_, parts_, merges_, expansions_;
};

}  // namespace gemq
