// One stack of experts against rows of x: the step that the gemm and the fused block are built from.
#pragma once

#include <vector>

#include "gemq/bits.h"
#include "gemq/parallel.h"
#include "moe_cpu/kernels.h"
#include "moe_cpu/moe.h"
#include "moe_cpu/routing.h"

namespace gemq {

constexpr int kBlockRows = 16;

struct Projection {
  const Kernels& kernels;
  Stack stack;
  int k, group_size;
  const float* x;
  std::vector<float> sums;    // of x over groups, one row for each row of x
  std::vector<int32_t> rows;  // row of x for each of routing.pairs

  int groups() const { return k / group_size; }

  void sum_row(int64_t row) { kernels.group_sums(x + row * k, k, group_size, sums.data() + row * groups()); }

  // out[count][16] of one block of expert e, for its pairs [begin, end) of the routing.
  void block(int e, int64_t block, int begin, int end, float* out) const {
    const int bits = stack.bits[e];
    const int64_t code_bytes = static_cast<int64_t>(k) * 2 * bits,
                  halves = static_cast<int64_t>(groups()) * 32;
    kernels.block_product({stack.codes + stack.code_offsets[e] + block * code_bytes,
                           stack.meta + stack.meta_offsets[e] + block * halves, bits, k, group_size, x,
                           sums.data(), rows.data() + begin, end - begin},
                          out);
  }
};

}  // namespace gemq
