#include "moe_cpu/moe.h"
#include "moe_cpu/output.h"
#include "moe_cpu/projection.h"

namespace gemq {
namespace {

// Everything the threads share.
struct Ffn {
  const MoeFfnArgs& args;
  const Kernels& kernels;
  const Routing& routing;
  Projection gate_up, down;
  const Output& output;

  // One thread's memory: gate and up tiles, one group of the busiest expert's inner activations, a row of x.
  struct Scratch {
    float *gate, *up, *group, *row;
  };
  int64_t tile() const { return static_cast<int64_t>(routing.most) * kBlockPair * kBlockRows; }
  int64_t group() const { return static_cast<int64_t>(routing.most) * args.down_group_size; }
  int64_t scratch_size() const { return 2 * tile() + group() + args.hidden; }
  Scratch scratch(float* at) const { return {at, at + tile(), at + 2 * tile(), at + 2 * tile() + group()}; }

  // Columns [first, first + down_group_size) of silu(gate) * up for the pairs of expert e, handed to the down
  // projection at once: a group is what it rounds together, so nobody waits for the rest of the row.
  void inner_group(int e, int64_t group, const Scratch& s) {
    const int size = args.down_group_size, begin = routing.starts[e], end = routing.starts[e + 1];
    const int count = end - begin;
    const int64_t first = group * size / kBlockRows, up_blocks = args.intermediate / kBlockRows;
    Projection::in_pairs({first, first + size / kBlockRows}, [&](int64_t block, int width) {
      gate_up.product(e, block, width, begin, end, s.gate);
      gate_up.product(e, up_blocks + block, width, begin, end, s.up);
      kernels.silu_mul(s.gate, s.up, s.gate, width * count);
      for (int i = 0; i < width * count; ++i) {
        float* to = s.group + i % count * size + (block - first + i / count) * kBlockRows;
        for (int r = 0; r < kBlockRows; ++r) to[r] = s.gate[i * kBlockRows + r];
      }
    });
    for (int i = 0; i < count; ++i) {
      down.x.put(routing.pairs[begin + i], static_cast<int>(group) * size, s.group + i * size, size);
    }
  }

  // What a group of an expert costs, in bytes of memory: its weights, and a token's work on them.
  int64_t cost(int e) const {
    const int64_t tokens = routing.starts[e + 1] - routing.starts[e];
    return gate_up.stack.bits[e] + 1 + 4 * (tokens - 1);
  }

  // The rank's share of all groups of all live experts, by cost; contiguous, whole groups.
  void first_half(Team team, const Scratch& s) {
    const int64_t groups = args.intermediate / args.down_group_size;
    int64_t total = 0, before = 0;
    for (const int e : routing.live) total += cost(e) * groups;
    const Range mine = team.share(total);
    for (const int e : routing.live) {
      const int64_t price = cost(e);
      const auto group_at = [&](int64_t at) {
        const int64_t group = ceil_div(at > before ? at - before : 0, price);
        return group < groups ? group : groups;
      };
      const int64_t end = group_at(mine.end);
      for (int64_t group = group_at(mine.begin); group < end; ++group) inner_group(e, group, s);
      before += price * groups;
    }
  }

  void run(Team team, const Scratch& s) {
    const Range tokens = team.share(args.tokens);
    for (int64_t row = tokens.begin; row < tokens.end; ++row)
      gate_up.x.put_row(row, args.x, args.type, s.row);
    team.barrier();
    first_half(team, s);
    team.barrier();
    write_blocks(down, routing, Projection::share(team, args.hidden), output, s.gate);
  }
};

}  // namespace

void moe_ffn_cpu(const MoeFfnArgs& a, int threads) {
  const Kernels& variant = kernels();
  const int64_t pairs = a.tokens * a.top_k;
  const auto live = [&](int e) { return a.gate_up.bits[e] > 0 && a.down.bits[e] > 0; };
  const Routing routing = route(a.topk_ids, pairs, a.num_experts, live);
  const auto* floats = a.type == kElementFloat32 ? static_cast<const float*>(a.x) : nullptr;
  Activations x(variant, a.precision, a.tokens, a.hidden, a.group_size, floats);
  Activations inner(variant, a.precision, pairs, a.intermediate, a.down_group_size);
  const Output output(variant, a.out, a.type, a.hidden, a.top_k, a.topk_weights, a.tokens);
  Ffn ffn{a,
          variant,
          routing,
          {variant, a.gate_up, x, routing.pairs},
          {variant, a.down, inner, routing.pairs},
          output};
  for (int32_t& row : ffn.gate_up.rows) row /= a.top_k;
  const Buffer<float> scratch(ffn.scratch_size() * threads);
  parallel(threads,
           [&](Team team) { ffn.run(team, ffn.scratch(scratch.get() + ffn.scratch_size() * team.rank)); });
}

}  // namespace gemq
