#include "moe_cpu/moe.h"
#include "moe_cpu/output.h"
#include "moe_cpu/projection.h"

namespace gemq {

void moe_gemm_cpu(const MoeGemmArgs& a, int threads) {
  const int64_t pairs = a.tokens * a.top_k, x_rows = a.x_per_slot ? pairs : a.tokens;
  const Routing routing = route(a.topk_ids, pairs, a.num_experts, [&](int e) { return a.stack.bits[e] > 0; });
  Projection projection{kernels(), a.stack, a.k, a.group_size, a.x, {}, routing.pairs};
  projection.sums.resize(x_rows * projection.groups());
  if (!a.x_per_slot) {
    for (int32_t& row : projection.rows) row /= a.top_k;
  }
  const int64_t tile_size = static_cast<int64_t>(routing.most) * kBlockRows;
  std::vector<float> tiles(tile_size * threads);
  const Output output{a.out, a.n, a.top_k, a.topk_weights};
  parallel(threads, [&](Team team) {
    const Range rows = team.share(x_rows);
    for (int64_t row = rows.begin; row < rows.end; ++row) projection.sum_row(row);
    team.barrier();
    const Range blocks = team.share(ceil_div(a.n, kBlockRows));
    output.clear(routing, a.tokens, blocks);
    write_blocks(projection, routing, a.num_experts, blocks, output, tiles.data() + tile_size * team.rank);
  });
}

void lowbit_gemm_cpu(const float* x, const uint8_t* codes, const uint16_t* meta, float* out, int64_t tokens,
                     int k, int64_t n, int bits, int group_size, int threads) {
  const int64_t at = 0;
  const int32_t width = bits;
  const std::vector<int64_t> ids(tokens, 0);
  const Stack stack{codes, meta, &width, &at, &at};
  moe_gemm_cpu({x, false, stack, 1, ids.data(), nullptr, out, tokens, 1, k, n, group_size}, threads);
}

}  // namespace gemq
