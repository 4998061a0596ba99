#include <cstring>

#include "moe_cpu/moe.h"
#include "moe_cpu/output.h"
#include "moe_cpu/projection.h"

namespace gemq {
namespace {

// Everything the threads share; `tiles` holds two tiles of the busiest expert's pairs for each thread.
struct Ffn {
  const MoeFfnArgs& args;
  Routing routing;
  Projection gate_up, down;
  std::vector<float> tiles;

  int64_t tile_size() const { return static_cast<int64_t>(routing.most) * kBlockRows; }
};

// scratch[pair] = silu(gate) * up, for blocks of the intermediate columns. These are whole groups of the down
// projection, so they are whole blocks of rows here, and the up rows start one too.
void first_half(const Ffn& f, Range blocks, float* gate, float* up) {
  const int64_t width = f.args.intermediate, up_blocks = width / kBlockRows;
  for (int e = 0; e < f.args.num_experts; ++e) {
    const int begin = f.routing.starts[e], end = f.routing.starts[e + 1];
    if (begin == end) continue;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      f.gate_up.block(e, block, begin, end, gate);
      f.gate_up.block(e, up_blocks + block, begin, end, up);
      f.gate_up.kernels.silu_mul(gate, up, gate, end - begin);
      for (int i = begin; i < end; ++i) {
        std::memcpy(f.args.scratch + f.routing.pairs[i] * width + block * kBlockRows,
                    gate + (i - begin) * kBlockRows, sizeof(float) * kBlockRows);
      }
    }
  }
}

void run(Ffn& f, Team team) {
  const MoeFfnArgs& a = f.args;
  float* tile = f.tiles.data() + 2 * f.tile_size() * team.rank;
  const Range tokens = team.share(a.tokens);
  for (int64_t row = tokens.begin; row < tokens.end; ++row) f.gate_up.sum_row(row);
  team.barrier();
  first_half(f, team.share(a.intermediate / kBlockRows), tile, tile + f.tile_size());
  team.barrier();
  const Range live = team.share(static_cast<int64_t>(f.routing.pairs.size()));
  for (int64_t i = live.begin; i < live.end; ++i) f.down.sum_row(f.routing.pairs[i]);
  team.barrier();
  const Output output{a.out, a.hidden, a.top_k, a.topk_weights};
  const Range blocks = team.share(ceil_div(a.hidden, kBlockRows));
  output.clear(f.routing, a.tokens, blocks);
  write_blocks(f.down, f.routing, a.num_experts, blocks, output, tile);
}

}  // namespace

void moe_ffn_cpu(const MoeFfnArgs& a, int threads) {
  const int64_t pairs = a.tokens * a.top_k;
  const auto live = [&](int e) { return a.gate_up.bits[e] > 0 && a.down.bits[e] > 0; };
  Ffn f{a,
        route(a.topk_ids, pairs, a.num_experts, live),
        {kernels(), a.gate_up, a.hidden, a.group_size, a.x, {}, {}},
        {kernels(), a.down, a.intermediate, a.down_group_size, a.scratch, {}, {}},
        {}};
  f.gate_up.rows = f.down.rows = f.routing.pairs;
  for (int32_t& row : f.gate_up.rows) row /= a.top_k;
  f.gate_up.sums.resize(a.tokens * f.gate_up.groups());
  f.down.sums.resize(pairs * f.down.groups());
  f.tiles.resize(2 * f.tile_size() * threads);
  parallel(threads, [&](Team team) { run(f, team); });
}

}  // namespace gemq
