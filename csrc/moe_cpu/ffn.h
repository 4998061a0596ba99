// The block of experts, piece by piece: what its threads share and what one item of work is.
#pragma once

#include "moe_cpu/product_output.h"
#include "moe_cpu/projection.h"

namespace gemq {

struct Ffn {
  const Kernels& kernels;
  Activation activation;
  int intermediate, down_group_size;
  const Routing& routing;
  Projection gate_up, down;

  // One thread's memory: gate and up tiles, one group of the busiest expert's inner activations.
  struct Scratch {
    float *gate, *up, *group;
  };
  static int64_t scratch_size(int most, int down_group_size) {
    return 2 * tile_floats(most) + static_cast<int64_t>(most) * down_group_size;
  }
  static Scratch scratch(float* at, int most) {
    return {at, at + tile_floats(most), at + 2 * tile_floats(most)};
  }

  // After routing: a row of x for each pair, and inner rows in the order of the experts, so that those which
  // a kernel takes are neighbours.
  void take_rows(int top_k) {
    const size_t pairs = routing.pairs.size();
    gate_up.rows.resize(pairs);
    down.rows.resize(pairs);
    for (size_t i = 0; i < pairs; ++i) {
      gate_up.rows[i] = routing.pairs[i] / top_k;
      down.rows[i] = static_cast<int32_t>(i);
    }
  }

  int64_t groups() const { return intermediate / down_group_size; }
  int64_t inner_items() const { return static_cast<int64_t>(routing.live.size()) * groups(); }

  // Columns [first, first + down_group_size) of the activation for the pairs of one expert, handed to the
  // down projection at once: a group is what it rounds together, so nobody waits for the rest of the row.
  void inner_group(int64_t item, const Scratch& s) {
    const int64_t group = item % groups();
    const int e = routing.live[item / groups()], size = down_group_size;
    const int begin = routing.starts[e], end = routing.starts[e + 1], count = end - begin;
    const int64_t first = group * size / kBlockRows, up_blocks = intermediate / kBlockRows;
    if (gate_up.stack.bits[e] == 0) {
      std::memset(s.group, 0, sizeof(float) * size);
      for (int i = begin; i < end; ++i) down.x.put(i, static_cast<int>(group) * size, s.group, size);
      return;
    }
    Projection::in_runs({first, first + size / kBlockRows}, count, [&](int64_t block, int width) {
      gate_up.product(e, block, width, begin, end, s.gate);
      if (activation.gated) gate_up.product(e, up_blocks + block, width, begin, end, s.up);
      kernels.activate(activation, s.gate, s.up, s.gate, width * count);
      for (int i = 0; i < width * count; ++i) {
        float* to = s.group + i % count * size + (block - first + i / count) * kBlockRows;
        for (int r = 0; r < kBlockRows; ++r) to[r] = s.gate[i * kBlockRows + r];
      }
    });
    for (int i = 0; i < count; ++i) {
      down.x.put(begin + i, static_cast<int>(group) * size, s.group + i * size, size);
    }
  }
};

}  // namespace gemq
