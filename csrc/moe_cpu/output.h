// Where products go: one row a pair, or added up into one row a token.
#pragma once

#include <cstring>

#include "moe_cpu/projection.h"

namespace gemq {

struct Output {
  float* out;  // [tokens, top_k, n], or [tokens, n] when weights is given
  int64_t n;
  int top_k;
  const float* weights;

  // Zeros whatever the given blocks of columns will not be overwritten with.
  void clear(const Routing& routing, int64_t tokens, Range blocks) const {
    const int64_t first = blocks.begin * kBlockRows;
    const int64_t last = blocks.end * kBlockRows < n ? blocks.end * kBlockRows : n;
    if (last <= first) return;
    const auto zero = [&](int64_t row) {
      std::memset(out + row * n + first, 0, sizeof(float) * (last - first));
    };
    if (weights != nullptr) {
      for (int64_t t = 0; t < tokens; ++t) zero(t);
    } else {
      for (const int32_t pair : routing.skipped) zero(pair);
    }
  }

  // Stores or adds 16 values of `pair`. Only one thread ever has this block, and experts come in order.
  void put(int32_t pair, int64_t block, const float* values) const {
    const int64_t first = block * kBlockRows;
    const int width = n - first < kBlockRows ? static_cast<int>(n - first) : kBlockRows;
    if (weights == nullptr) {
      std::memcpy(out + pair * n + first, values, sizeof(float) * width);
      return;
    }
    float* at = out + pair / top_k * n + first;
    for (int i = 0; i < width; ++i) at[i] += weights[pair] * values[i];
  }
};

// Every live expert's product for `blocks` of 16 columns; `tile` holds the busiest expert's pairs x 16.
inline void write_blocks(const Projection& projection, const Routing& routing, int num_experts, Range blocks,
                         const Output& output, float* tile) {
  for (int e = 0; e < num_experts; ++e) {
    const int begin = routing.starts[e], end = routing.starts[e + 1];
    if (begin == end) continue;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      projection.block(e, block, begin, end, tile);
      for (int i = begin; i < end; ++i) output.put(routing.pairs[i], block, tile + (i - begin) * kBlockRows);
    }
  }
}

}  // namespace gemq
