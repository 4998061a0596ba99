// One stack of experts against rows of activations: the step that the gemm and the fused block are built
// from.
#pragma once

#include <vector>

#include "gemq/layouts.h"
#include "gemq/phase.h"
#include "moe_cpu/activations.h"
#include "moe_cpu/moe.h"
#include "moe_cpu/routing.h"

namespace gemq {

constexpr int kBlockRows = kCpuRows;
static_assert(kBlockRows % 8 == 0, "codes of a block are whole bytes a column and bit");

// Blocks that a kernel takes at a time for so many tokens, and floats that their products need.
constexpr int blocks_at_once(int tokens) { return tokens <= kFewTokens ? kManyBlocks : kSomeBlocks; }
inline int64_t tile_floats(int most_tokens) {
  const int64_t few = static_cast<int64_t>(kFewTokens) * kManyBlocks,
                many = static_cast<int64_t>(most_tokens) * kSomeBlocks;
  return (few > many ? few : many) * kBlockRows;
}

struct Projection {
  const Kernels& kernels;
  Stack stack;
  Activations& x;
  std::vector<int32_t> rows;    // row of x for each of routing.pairs
  const float* bias = nullptr;  // [experts, n], n of whole blocks
  int64_t n = 0;

  // out[blocks][count][16] of some blocks of expert e, for its pairs [begin, end) of the routing. `out` must
  // have room for tile_floats of the count.
  void product(int e, int64_t block, int blocks, int begin, int end, float* out) const {
    const int bits = stack.bits[e];
    const int64_t code_bytes = static_cast<int64_t>(x.k()) * (kBlockRows / 8) * bits,
                  halves = static_cast<int64_t>(x.groups()) * 2 * kBlockRows;
    const BlockArgs args{stack.codes + stack.code_offsets[e] + block * code_bytes,
                         stack.meta + stack.meta_offsets[e] + block * halves,
                         bits,
                         x.k(),
                         x.group_size(),
                         blocks,
                         x.view(rows.data() + begin, end - begin)};
    x.integers() ? kernels.integer_product(args, out) : kernels.exact_product(args, out);
    if (bias != nullptr) add_bias(bias + e * n + block * kBlockRows, blocks, end - begin, out);
  }

  static void add_bias(const float* bias, int blocks, int count, float* out) {
    for (int i = 0; i < blocks * count; ++i) {
      for (int r = 0; r < kBlockRows; ++r) out[i * kBlockRows + r] += bias[i / count * kBlockRows + r];
    }
  }

  // Calls f(first block, how many) for as many blocks as the kernels like at a time.
  template <class F>
  static void in_runs(Range blocks, int tokens, F&& f) {
    const int step = blocks_at_once(tokens);
    for (int64_t block = blocks.begin; block < blocks.end; block += step) {
      f(block, static_cast<int>(blocks.end - block < step ? blocks.end - block : step));
    }
  }
};

}  // namespace gemq
