#include "gemq/phase.h"
#include "moe_cpu/moe.h"
#include "moe_cpu/product_output.h"
#include "moe_cpu/projection.h"

namespace gemq {

void moe_gemm_cpu(const MoeGemmArgs& a, int threads) {
  const Kernels& variant = kernels();
  const int64_t pairs = a.tokens * a.top_k, x_rows = a.x_per_slot ? pairs : a.tokens;
  Routing routing;
  routing.fill(a.topk_ids, pairs, a.num_experts, [&](int e) { return a.stack.bits[e] > 0; });
  const auto* floats = a.type == kElementFloat32 ? static_cast<const float*>(a.x) : nullptr;
  Activations x(variant, a.precision, x_rows, a.k, a.group_size, floats);
  Projection projection{variant, a.stack, x, routing.pairs};
  if (!a.x_per_slot) {
    for (int32_t& row : projection.rows) row /= a.top_k;
  }
  const int64_t tile_size = tile_floats(routing.most);
  const Buffer<float> tiles((tile_size + a.k) * threads);
  const Output output(variant, a.out, a.type, a.n, a.top_k, a.topk_weights, a.tokens);
  Phase rows(x_rows, threads), columns(column_runs(a.n), threads);
  parallel(threads, [&](Team team) {
    float* tile = tiles.get() + (tile_size + a.k) * team.rank;
    rows.work(team, [&](int64_t row) { x.put_row(row, a.x, a.type, tile + tile_size); });
    rows.wait();
    columns.work(team, [&](int64_t run) { write_columns(projection, routing, run, output, tile); });
  });
}

void lowbit_gemm_cpu(const void* x, const uint8_t* codes, const uint16_t* meta, void* out, int64_t tokens,
                     int k, int64_t n, int bits, int group_size, Element type, Precision precision,
                     int threads) {
  const int64_t at = 0;
  const int32_t width = bits;
  const std::vector<int64_t> ids(tokens, 0);
  const Stack stack{codes, meta, &width, &at, &at};
  moe_gemm_cpu({x, false, stack, 1, ids.data(), nullptr, out, tokens, 1, k, n, group_size, type, precision},
               threads);
}

}  // namespace gemq
