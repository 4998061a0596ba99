#include "gemq/phase.h"
#include "moe_cpu/ffn.h"
#include "moe_cpu/moe.h"

namespace gemq {

void moe_ffn_cpu(const MoeFfnArgs& a, int threads) {
  const Kernels& variant = kernels();
  const int64_t pairs = a.tokens * a.top_k;
  const auto live = [&](int e) { return a.down.bits[e] > 0; };
  Routing routing;
  routing.fill(a.topk_ids, pairs, a.num_experts, live);
  const auto* floats = a.type == kElementFloat32 ? static_cast<const float*>(a.x) : nullptr;
  Activations x(variant, a.precision, a.tokens, a.hidden, a.group_size, floats);
  Activations inner(variant, a.precision, pairs, a.intermediate, a.down_group_size);
  const Output output(variant, a.out, a.type, a.hidden, a.top_k, a.topk_weights, a.tokens);
  const int64_t inner_rows = (a.activation.gated ? 2 : 1) * static_cast<int64_t>(a.intermediate);
  Ffn ffn{variant,
          a.activation,
          a.intermediate,
          a.down_group_size,
          routing,
          {variant, a.gate_up, x, {}, a.gate_up_bias, inner_rows},
          {variant, a.down, inner, {}, a.down_bias, a.hidden}};
  ffn.take_rows(a.top_k);
  // and a row of x
  const int64_t own_size = Ffn::scratch_size(routing.most, a.down_group_size) + a.hidden;
  const Buffer<float> memory(own_size * threads);
  Phase rows(a.tokens, threads), columns(column_runs(a.hidden), threads);
  Phase inner_groups(ffn.inner_items(), threads);
  parallel(threads, [&](Team team) {
    float* const row = memory.get() + own_size * team.rank;
    const Ffn::Scratch own = Ffn::scratch(row + a.hidden, routing.most);
    rows.work(team, [&](int64_t token) { x.put_row(token, a.x, a.type, row); });
    rows.wait();
    inner_groups.work(team, [&](int64_t item) { ffn.inner_group(item, own); });
    inner_groups.wait();
    columns.work(team, [&](int64_t run) { write_columns(ffn.down, routing, run, output, own.gate); });
  });
}

}  // namespace gemq
