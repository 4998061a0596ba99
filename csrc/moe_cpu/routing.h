// Which (token, slot) pairs each expert works on.
#pragma once

#include <cstdint>
#include <vector>

namespace gemq {

// Pairs, numbered token * top_k + slot, sorted by expert; within one expert in order.
struct Routing {
  std::vector<int32_t> pairs;    // pairs of live experts
  std::vector<int32_t> starts;   // [num_experts + 1] into pairs
  std::vector<int32_t> live;     // experts that have pairs
  std::vector<int32_t> skipped;  // pairs that contribute zero
  int most = 0;                  // pairs of the busiest expert

  // Sorts `count` ids; `lives(e)` tells whether expert e contributes at all. Memory of an earlier call is
  // used again.
  template <class Live>
  void fill(const int64_t* ids, int64_t count, int num_experts, Live&& lives) {
    const auto used = [&](int64_t id) { return id >= 0 && id < num_experts && lives(static_cast<int>(id)); };
    live.clear();
    skipped.clear();
    most = 0;
    starts.assign(num_experts + 1, 0);
    for (int64_t p = 0; p < count; ++p) {
      if (used(ids[p])) ++starts[ids[p] + 1];
    }
    for (int e = 0; e < num_experts; ++e) {
      if (starts[e + 1] > 0) live.push_back(e);
      if (starts[e + 1] > most) most = starts[e + 1];
      starts[e + 1] += starts[e];
    }
    next_.assign(starts.begin(), starts.end() - 1);
    pairs.resize(starts[num_experts]);
    for (int64_t p = 0; p < count; ++p) {
      const auto pair = static_cast<int32_t>(p);
      if (used(ids[p])) {
        pairs[next_[ids[p]]++] = pair;
      } else {
        skipped.push_back(pair);
      }
    }
  }

private:
  std::vector<int32_t> next_;
};

}  // namespace gemq
