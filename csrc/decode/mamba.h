// A Mamba-2 mixer (Nemotron-H) for the new tokens, between its two projections: convolution, the state's
// step, and a gated norm of every group.
#pragma once

#include <vector>

#include "decode/operation.h"

namespace gemq {

struct MambaShape {
  int heads, dim;                         // numbers a head
  int groups, states;                     // heads of a group share what goes into the state and comes from it
  int taps;                               // of the convolution
  std::vector<float> weights, bias;       // [taps, channels]; [channels] or empty
  std::vector<float> rate, offset, skip;  // [heads]: step = softplus(. + offset), decay = e^(rate * step)
  std::vector<float> norm;                // [heads * dim]
  float eps;
  float* past;   // [batch, taps - 1, channels]
  float* state;  // [batch, heads, dim, states]

  int64_t inner() const { return static_cast<int64_t>(heads) * dim; }
  int64_t shared() const { return static_cast<int64_t>(groups) * states; }
  int64_t channels() const { return inner() + 2 * shared(); }
  // of the first projection: gate, channels, steps
  int64_t width() const { return inner() + channels() + heads; }
};

class Mamba : public Operation {
public:
  Mamba(const Kernels& kernels, const Rows& projected, Rows& out, MambaShape shape);
  const char* name() const override { return "mamba"; }
  void reset(const StepInput&, int threads) override;
  void run(const StepInput&, Team team, float* scratch) override;

private:
  static constexpr int64_t kChannels = 512;  // an item
  int64_t runs() const { return (shape_.channels() + kChannels - 1) / kChannels; }
  void convolve(int64_t row, int64_t first);
  void head(int64_t row, int head);
  void norm(int64_t row);

  const Kernels& kernels_;
  const Rows& projected_;
  Rows& out_;
  MambaShape shape_;
  AlignedFloats mixed_;  // [batch, channels]
  Phase convolutions_, heads_;
};

}  // namespace gemq
