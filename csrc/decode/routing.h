// Router logits to experts and their weights: gemq.reference.topk_routing, and the group-limited choices of
// DeepSeek and GLM4.
#pragma once

#include <cstdint>
#include <vector>

namespace gemq {

enum GroupScore : int { kNoGroups = 0, kLargest = 1, kTwoLargest = 2 };

struct RoutingRule {
  bool sigmoid;             // of each logit; else softmax over all
  std::vector<float> bias;  // added for the choice alone; or empty
  // Experts in `groups` runs; only the `kept_groups` best runs take part, by their largest score or the sum
  // of the two largest.
  GroupScore group_score;
  int groups, kept_groups;
  bool normalize;                   // divide the weights by their sum
  float epsilon;                    // added to that sum
  float scale;                      // of the weights at last
  std::vector<float> expert_scale;  // of each expert's weight at last; or empty
};

struct RoutingScratch {
  std::vector<float> scores, choice, group_scores;
  std::vector<char> taken;
};

// Largest first, the lower index first among equals; NaN counts as the largest. ids and weights are [top_k].
void choose_experts(const RoutingRule& rule, const float* logits, int experts, int top_k, int64_t* ids,
                    float* weights, RoutingScratch& scratch);

}  // namespace gemq
