#include "decode/routing.h"

#include <cmath>
#include <limits>

#include "decode/scalars.h"

namespace gemq {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

bool above(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// The place of the largest among `count` that is not `taken` (-1: nothing is).
int largest(const float* values, int count, const std::vector<char>& taken) {
  int best = -1;
  for (int i = 0; i < count; ++i) {
    if (!taken[i] && (best < 0 || above(values[i], values[best]))) best = i;
  }
  return best;
}

void scores_of(const RoutingRule& rule, const float* logits, int experts, float* scores) {
  if (rule.sigmoid) {
    for (int e = 0; e < experts; ++e) scores[e] = sigmoid(logits[e]);
    return;
  }
  float most = logits[0], sum = 0;
  for (int e = 1; e < experts; ++e) most = logits[e] > most ? logits[e] : most;
  for (int e = 0; e < experts; ++e) sum += scores[e] = std::exp(logits[e] - most);
  for (int e = 0; e < experts; ++e) scores[e] /= sum;
}

float score_of_group(GroupScore kind, const float* choice, int size) {
  float first = choice[0], second = kNever;
  for (int i = 1; i < size; ++i) {
    if (above(choice[i], first)) {
      second = first;
      first = choice[i];
    } else if (above(choice[i], second)) {
      second = choice[i];
    }
  }
  return kind == kTwoLargest ? first + second : first;
}

// Leaves only the best groups in the running.
void keep_groups(const RoutingRule& rule, int experts, RoutingScratch& s) {
  const int size = experts / rule.groups;
  s.group_scores.resize(rule.groups);
  s.taken.assign(rule.groups, 0);
  for (int g = 0; g < rule.groups; ++g) {
    s.group_scores[g] = score_of_group(rule.group_score, s.choice.data() + g * size, size);
  }
  for (int i = 0; i < rule.kept_groups; ++i) {
    s.taken[largest(s.group_scores.data(), rule.groups, s.taken)] = 1;
  }
  for (int e = 0; e < experts; ++e) {
    if (!s.taken[e / size]) s.choice[e] = kNever;
  }
}

}  // namespace

void choose_experts(const RoutingRule& rule, const float* logits, int experts, int top_k, int64_t* ids,
                    float* weights, RoutingScratch& s) {
  s.scores.resize(experts);
  scores_of(rule, logits, experts, s.scores.data());
  s.choice = s.scores;
  for (size_t e = 0; e < rule.bias.size(); ++e) s.choice[e] += rule.bias[e];
  if (rule.group_score != kNoGroups) keep_groups(rule, experts, s);
  s.taken.assign(experts, 0);
  float sum = 0;
  for (int i = 0; i < top_k; ++i) {
    const int e = largest(s.choice.data(), experts, s.taken);
    s.taken[e] = 1;
    ids[i] = e;
    weights[i] = s.scores[e];
    sum += weights[i];
  }
  const float factor = rule.scale / (rule.normalize ? sum + rule.epsilon : 1.0f);
  for (int i = 0; i < top_k; ++i) {
    weights[i] *= rule.expert_scale.empty() ? factor : factor * rule.expert_scale[ids[i]];
  }
}

}  // namespace gemq
