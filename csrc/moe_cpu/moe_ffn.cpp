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

  // One thread's memory: gate and up tiles, one group of the busiest expert's inner activations, a row of x.
  struct Scratch {
    float *gate, *up, *group, *row;
  };
  int64_t tile() const { return tile_floats(routing.most); }
  int64_t group() const { return static_cast<int64_t>(routing.most) * args.down_group_size; }
  int64_t scratch_size() const { return 2 * tile() + group() + args.hidden; }
  Scratch scratch(float* at) const { return {at, at + tile(), at + 2 * tile(), at + 2 * tile() + group()}; }

  // Columns [first, first + down_group_size) of silu(gate) * up for the pairs of expert e, handed to the down
  // projection at once: a group is what it rounds together, so nobody waits for the rest of the row.
  void inner_group(int e, int64_t group, const Scratch& s) {
    const int size = args.down_group_size, begin = routing.starts[e], end = routing.starts[e + 1];
    const int count = end - begin;
    const int64_t first = group * size / kBlockRows, up_blocks = args.intermediate / kBlockRows;
    Projection::in_runs({first, first + size / kBlockRows}, count, [&](int64_t block, int width) {
      gate_up.product(e, block, width, begin, end, s.gate);
      gate_up.product(e, up_blocks + block, width, begin, end, s.up);
      kernels.silu_mul(s.gate, s.up, s.gate, width * count);
      for (int i = 0; i < width * count; ++i) {
        float* to = s.group + i % count * size + (block - first + i / count) * kBlockRows;
        for (int r = 0; r < kBlockRows; ++r) to[r] = s.gate[i * kBlockRows + r];
      }
    });
    for (int i = 0; i < count; ++i) {
      down.x.put(begin + i, static_cast<int>(group) * size, s.group + i * size, size);
    }
  }

  int64_t groups() const { return args.intermediate / args.down_group_size; }
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
  Ffn ffn{
      a, variant, routing, {variant, a.gate_up, x, routing.pairs}, {variant, a.down, inner, routing.pairs}};
  for (int32_t& row : ffn.gate_up.rows) row /= a.top_k;
  // inner rows lie in the order of the experts: those that a kernel takes are neighbours
  for (size_t i = 0; i < ffn.down.rows.size(); ++i) ffn.down.rows[i] = static_cast<int32_t>(i);
  const Buffer<float> memory(ffn.scratch_size() * threads);
  Phase rows(a.tokens, threads), columns(column_runs(a.hidden), threads);
  Phase inner_groups(static_cast<int64_t>(routing.live.size()) * ffn.groups(), threads);
  parallel(threads, [&](Team team) {
    const Ffn::Scratch own = ffn.scratch(memory.get() + ffn.scratch_size() * team.rank);
    rows.work(team, [&](int64_t row) { x.put_row(row, a.x, a.type, own.row); });
    rows.wait();
    inner_groups.work(team, [&](int64_t item) {
      ffn.inner_group(routing.live[item / ffn.groups()], item % ffn.groups(), own);
    });
    inner_groups.wait();
    columns.work(team, [&](int64_t run) { write_columns(ffn.down, routing, run, output, own.gate); });
  });
}

}  // namespace gemq
