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
};

// `live(e)` tells whether expert e contributes at all.
template <class Live>
Routing route(const int64_t* ids, int64_t count, int num_experts, Live&& live) {
  Routing routing;
  const auto used = [&](int64_t id) { return id >= 0 && id < num_experts && live(static_cast<int>(id)); };
  routing.starts.assign(num_experts + 1, 0);
  for (int64_t p = 0; p < count; ++p) {
    if (used(ids[p])) ++routing.starts[ids[p] + 1];
  }
  for (int e = 0; e < num_experts; ++e) {
    if (routing.starts[e + 1] > 0) routing.live.push_back(e);
    if (routing.starts[e + 1] > routing.most) routing.most = routing.starts[e + 1];
    routing.starts[e + 1] += routing.starts[e];
  }
  std::vector<int32_t> next(routing.starts.begin(), routing.starts.end() - 1);
  routing.pairs.resize(routing.starts[num_experts]);
  for (int64_t p = 0; p < count; ++p) {
    const auto pair = static_cast<int32_t>(p);
    if (used(ids[p])) {
      routing.pairs[next[ids[p]]++] = pair;
    } else {
      routing.skipped.push_back(pair);
    }
  }
  return routing;
}

}  // namespace gemq
