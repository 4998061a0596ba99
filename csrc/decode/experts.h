// Routing and the block of experts in a decode step.
#pragma once

#include <atomic>
#include <vector>

#include "decode/operation.h"
#include "decode/routing.h"
#include "moe_cpu/ffn.h"
#include "moe_cpu/moe.h"

namespace gemq {

struct ExpertsShape {
  Stack gate_up, down;
  int experts, top_k, hidden, intermediate, group_size, down_group_size;
  Activation activation;
  std::vector<float> gate_up_bias, down_bias;  // [experts, rows], or empty
  bool onto;                                   // add to what `out` holds
};

// out = or += the weighted sum of the experts that each row's logits choose
class Experts : public Operation {
public:
  Experts(const Kernels& kernels, Precision precision, const Rows& logits, Rows& x, Rows& out,
          RoutingRule rule, ExpertsShape shape);
  const char* name() const override { return "experts"; }
  void reset(const StepInput&, int threads) override;
  void run(const StepInput&, Team team, float* scratch) override;
  int64_t scratch_floats() const override;

private:
  void choose(int64_t row);

  const Rows& logits_;
  Rows& out_;
  RoutingRule rule_;
  ExpertsShape shape_;
  int threads_ = 1;
  std::vector<int64_t> ids_;    // [batch, top_k]
  std::vector<float> weights_;  // [batch, top_k]
  std::vector<RoutingScratch> scratch_;
  std::atomic<int64_t> chosen_{0};
  Routing routing_;
  Activations inner_;
  Ffn ffn_;
  Output output_;
  Phase rows_, groups_;
};

}  // namespace gemq
