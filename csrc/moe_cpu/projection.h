// One stack of experts against rows of activations: the step that the gemm and the fused block are built
// from.
#pragma once

#include <vector>

#include "gemq/bits.h"
#include "gemq/phase.h"
#include "moe_cpu/activations.h"
#include "moe_cpu/moe.h"
#include "moe_cpu/routing.h"

namespace gemq {

constexpr int kBlockRows = 16;
// Blocks that a kernel takes at a time; tiles have room for that many.
constexpr int kBlockPair = 2;

struct Projection {
  const Kernels& kernels;
  Stack stack;
  Activations& x;
  std::vector<int32_t> rows;  // row of x for each of routing.pairs

  // out[blocks][count][16] of one or two blocks of expert e, for its pairs [begin, end) of the routing.
  // `out` must have room for two blocks.
  void product(int e, int64_t block, int blocks, int begin, int end, float* out) const {
    const int bits = stack.bits[e];
    const int64_t code_bytes = static_cast<int64_t>(x.k()) * 2 * bits,
                  halves = static_cast<int64_t>(x.groups()) * 2 * kBlockRows;
    const BlockArgs args{stack.codes + stack.code_offsets[e] + block * code_bytes,
                         stack.meta + stack.meta_offsets[e] + block * halves,
                         bits,
                         x.k(),
                         x.group_size(),
                         blocks,
                         x.view(rows.data() + begin, end - begin)};
    x.integers() ? kernels.integer_product(args, out) : kernels.exact_product(args, out);
  }

  // Calls f(first block, how many) for pairs of blocks, which is how the kernels like them.
  template <class F>
  static void in_pairs(Range blocks, F&& f) {
    for (int64_t block = blocks.begin; block < blocks.end; block += kBlockPair) {
      f(block, blocks.end - block < kBlockPair ? 1 : kBlockPair);
    }
  }
};

}  // namespace gemq
