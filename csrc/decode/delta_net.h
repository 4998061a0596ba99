// Linear attention by the gated delta rule (Qwen3-Next, Qwen3.5) for the new tokens: convolution, normed
// queries and keys, the state's step, and a gated norm of every head.
#pragma once

#include <vector>

#include "decode/operation.h"

namespace gemq {

struct DeltaShape {
  // Numbers of key head j start at offset + j * stride of a row.
  struct Part {
    const Rows* rows;
    int64_t offset, stride;
  };
  Part query, key, value, gate, beta, decay;
  int key_heads, value_heads;       // value heads in runs that share a key head
  int key_dim, value_dim;           // numbers a head
  int taps;                         // of the convolution
  std::vector<float> weights;       // [taps, channels]: queries, keys, values
  std::vector<float> rate, offset;  // [value_heads]: decay = e^(rate * softplus(decay + offset))
  std::vector<float> norm;          // [value_dim]
  float eps;
  float* past;   // [batch, taps - 1, channels]
  float* state;  // [batch, value_heads, key_dim, value_dim]

  int64_t heads_a_key() const { return value_heads / key_heads; }
  int64_t keys() const { return static_cast<int64_t>(key_heads) * key_dim; }
  int64_t values() const { return static_cast<int64_t>(value_heads) * value_dim; }
  int64_t channels() const { return 2 * keys() + values(); }
};

class DeltaNet : public Operation {
public:
  DeltaNet(const Kernels& kernels, Rows& out, DeltaShape shape);
  const char* name() const override { return "delta_net"; }
  void reset(const StepInput&, int threads) override;
  void run(const StepInput&, Team team, float* scratch) override;
  int64_t scratch_floats() const override {
    return 2 * shape_.key_dim + shape_.heads_a_key() * shape_.value_dim;
  }

private:
  void heads(int64_t row, int head, float* scratch);
  void convolve(int64_t row, const DeltaShape::Part& part, int head, int64_t first, int64_t count, float* to);

  const Kernels& kernels_;
  Rows& out_;
  DeltaShape shape_;
  std::vector<float> query_scale_, key_scale_;
  Phase parts_;
};

}  // namespace gemq
