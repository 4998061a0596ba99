#include "bind_decode.h"

#include "checks.h"

namespace gemq {
namespace {

Rows& rows(Program& program, const std::string& name, int number) {
  check_range(name, number, 0, program.buffers() - 1);
  return program.rows(number);
}

Rows& rows(Program& program, const std::string& name, int number, int64_t width) {
  Rows& found = rows(program, name, number);
  if (found.width() != width) bad_value(name + ": its width", found.width(), std::to_string(width));
  return found;
}

std::vector<float> floats(uintptr_t at, int64_t count) {
  if (at == 0) return {};
  const auto* from = reinterpret_cast<const float*>(at);
  return {from, from + count};
}

}  // namespace

int bind_buffer(Program& program, int64_t width, uintptr_t external) {
  check_at_least("width", width, 1);
  check_int32("width", width);
  return program.buffer(width, reinterpret_cast<float*>(external));
}

void bind_embed(Program& program, uintptr_t table, int type, int64_t tokens, float scale, int out) {
  check_pointer("table", table);
  check_at_least("tokens", tokens, 1);
  program.limits.tokens = tokens;
  program.add<Embed>(program.variant(), reinterpret_cast<const void*>(table), check_type(type), scale,
                     rows(program, "out", out));
}

void bind_embed_packed(Program& program, uintptr_t codes, uintptr_t meta, int bits, int group_size,
                       bool tiled, int64_t tokens, float scale, int out) {
  check_pointer("codes", codes);
  check_pointer("meta", meta);
  check_range("bits", bits, 1, kMaxBits);
  check_at_least("tokens", tokens, 1);
  Rows& to = rows(program, "out", out);
  check_groups("group_size", group_size, "out: its width", to.width());
  program.limits.tokens = tokens;
  const PackedTable table{reinterpret_cast<const uint8_t*>(codes),
                          reinterpret_cast<const uint16_t*>(meta),
                          to.width(),
                          bits,
                          group_size,
                          tiled};
  program.add<EmbedPacked>(table, scale, to);
}

void bind_norm(Program& program, int x, uintptr_t weight, float eps, int out, bool onto, float scale) {
  check_pointer("weight", weight);
  const Rows& from = rows(program, "x", x);
  program.add<Norm>(program.variant(), from, floats(weight, from.width()), eps,
                    rows(program, "out", out, from.width()), onto, scale);
}

void bind_activate(Program& program, int gate, int up, int out, bool gated, float slope, float cubic,
                   float limit, float shift) {
  const Rows& first = rows(program, "gate", gate);
  program.add<Activate>(program.variant(), Activation{gated, slope, cubic, limit, shift}, first,
                        rows(program, "up", up, first.width()), rows(program, "out", out, first.width()));
}

void bind_linear(Program& program, int x, const std::vector<MatrixAddress>& matrices, bool onto, int gate) {
  Rows& from = rows(program, "x", x);
  std::vector<Matrix> found;
  for (const MatrixAddress& m : matrices) {
    check_pointer("weights", m.weights);
    check_at_least("n", m.n, 1);
    check_range("bits", m.bits, 0, kMaxBits);
    if (m.bits > 0) {
      check_pointer("meta", m.meta);
      check_groups("group_size", m.group_size, "width of x", from.width());
    }
    found.push_back({reinterpret_cast<const void*>(m.weights), reinterpret_cast<const uint16_t*>(m.meta),
                     m.bits, m.group_size, check_type(m.type), m.n, floats(m.bias, m.n),
                     &rows(program, "out", m.out, m.n)});
  }
  const Rows* factor = gate < 0 ? nullptr : &rows(program, "gate", gate);
  program.add<Linear>(program.variant(), from, std::move(found), onto, factor);
}

void bind_attend(Program& program, const AttentionAddress& a) {
  for (const auto& [name, value] : {std::pair{"heads", a.heads}, {"groups", a.groups}, {"dim", a.dim}}) {
    check_at_least(name, value, 1);
  }
  if (a.heads % a.groups != 0)
    bad_value("heads", a.heads, "a multiple of groups=" + std::to_string(a.groups));
  check_range("rotary", a.rotary, 0, a.dim);
  if (a.rotary % 2 != 0) bad_value("rotary", a.rotary, "even");
  check_pointer("keys", a.keys);
  check_pointer("values", a.values);
  check_at_least("slots", a.slots, 1);
  if (a.rotary > 0) {
    check_pointer("cosines", a.cosines);
    check_pointer("sines", a.sines);
    check_at_least("positions", a.positions, 1);
    program.limits.positions = std::min(program.limits.positions, a.positions);
  }
  const int64_t outputs = static_cast<int64_t>(a.heads) * a.dim,
                keys = static_cast<int64_t>(a.groups) * a.dim;
  AttentionShape shape{a.heads,
                       a.groups,
                       a.dim,
                       a.gated,
                       a.rotary,
                       reinterpret_cast<const float*>(a.cosines),
                       reinterpret_cast<const float*>(a.sines),
                       a.positions,
                       reinterpret_cast<void*>(a.keys),
                       reinterpret_cast<void*>(a.values),
                       check_type(a.type),
                       a.slots,
                       a.window,
                       a.scale,
                       floats(a.query_norm, a.dim),
                       floats(a.key_norm, a.dim),
                       floats(a.value_norm, a.dim),
                       a.eps,
                       floats(a.sinks, a.heads)};
  if (!a.window) program.limits.slots = std::min(program.limits.slots, a.slots);
  program.add<Attend>(program.variant(), program.chunk_memory(),
                      rows(program, "query", a.query, (a.gated ? 2 : 1) * outputs),
                      rows(program, "key", a.key, keys), rows(program, "value", a.value, keys),
                      rows(program, "out", a.out, outputs), std::move(shape));
}

void bind_attend_latent(Program& program, const LatentAddress& a) {
  for (const auto& [name, value] :
       {std::pair{"heads", a.heads}, {"nope", a.nope}, {"rank", a.rank}, {"v_dim", a.v_dim}}) {
    check_at_least(name, value, 1);
  }
  if (a.rope < 2 || a.rope % 2 != 0) bad_value("rope", a.rope, "even and at least 2");
  for (const auto& [name, at] : {std::pair{"into", a.into},
                                 {"from", a.from},
                                 {"norm", a.norm},
                                 {"cosines", a.cosines},
                                 {"sines", a.sines},
                                 {"latents", a.latents},
                                 {"ropes", a.ropes}}) {
    check_pointer(name, at);
  }
  check_at_least("slots", a.slots, 1);
  check_at_least("positions", a.positions, 1);
  LatentShape shape{a.heads,
                    a.nope,
                    a.rope,
                    a.rank,
                    a.v_dim,
                    reinterpret_cast<const void*>(a.into),
                    reinterpret_cast<const void*>(a.from),
                    check_type(a.expand_type),
                    floats(a.norm, a.rank),
                    a.eps,
                    reinterpret_cast<const float*>(a.cosines),
                    reinterpret_cast<const float*>(a.sines),
                    a.positions,
                    a.apart,
                    reinterpret_cast<void*>(a.latents),
                    reinterpret_cast<void*>(a.ropes),
                    check_type(a.type),
                    a.slots,
                    a.window,
                    a.scale};
  if (!a.window) program.limits.slots = std::min(program.limits.slots, a.slots);
  program.limits.positions = std::min(program.limits.positions, a.positions);
  const auto heads = static_cast<int64_t>(a.heads);
  program.add<AttendLatent>(program.variant(), program.chunk_memory(),
                            rows(program, "query", a.query, heads * (a.nope + a.rope)),
                            rows(program, "latent", a.latent, a.rank + a.rope),
                            rows(program, "out", a.out, heads * a.v_dim), std::move(shape));
}

namespace {

// A part of `count` numbers for each of `heads` key heads.
DeltaShape::Part part(Program& program, const std::string& name, const PartAddress& a, int64_t count,
                      int heads) {
  const Rows& found = rows(program, name, a.buffer);
  check_at_least((name + ".offset").c_str(), a.offset, 0);
  check_at_least((name + ".stride").c_str(), a.stride, count);
  const int64_t end = a.offset + (heads - 1) * a.stride + count;
  if (end > found.width()) bad_value(name + ": its end", end, "at most " + std::to_string(found.width()));
  return {&found, a.offset, a.stride};
}

}  // namespace

void bind_delta_net(Program& program, const DeltaAddress& a) {
  for (const auto& [name, value] : {std::pair{"key_heads", a.key_heads},
                                    {"value_heads", a.value_heads},
                                    {"key_dim", a.key_dim},
                                    {"value_dim", a.value_dim}}) {
    check_at_least(name, value, 1);
  }
  if (a.value_heads % a.key_heads != 0)
    bad_value("value_heads", a.value_heads, "a multiple of key_heads=" + std::to_string(a.key_heads));
  check_at_least("taps", a.taps, 2);
  for (const auto& [name, at] : {std::pair{"weights", a.weights},
                                 {"rate", a.rate},
                                 {"offset", a.offset},
                                 {"norm", a.norm},
                                 {"past", a.past},
                                 {"state", a.state}}) {
    check_pointer(name, at);
  }
  const int shared = a.value_heads / a.key_heads, heads = a.key_heads;
  const int64_t values = static_cast<int64_t>(shared) * a.value_dim;
  DeltaShape shape{part(program, "query", a.query, a.key_dim, heads),
                   part(program, "key", a.key, a.key_dim, heads),
                   part(program, "value", a.value, values, heads),
                   part(program, "gate", a.gate, values, heads),
                   part(program, "beta", a.beta, shared, heads),
                   part(program, "decay", a.decay, shared, heads),
                   a.key_heads,
                   a.value_heads,
                   a.key_dim,
                   a.value_dim,
                   a.taps,
                   {},
                   floats(a.rate, a.value_heads),
                   floats(a.offset, a.value_heads),
                   floats(a.norm, a.value_dim),
                   a.eps,
                   reinterpret_cast<float*>(a.past),
                   reinterpret_cast<float*>(a.state)};
  shape.weights = floats(a.weights, a.taps * shape.channels());
  Rows& out = rows(program, "out", a.out, shape.values());
  program.add<DeltaNet>(program.variant(), out, std::move(shape));
}

void bind_mamba(Program& program, const MambaAddress& a) {
  for (const auto& [name, value] :
       {std::pair{"heads", a.heads}, {"dim", a.dim}, {"groups", a.groups}, {"states", a.states}}) {
    check_at_least(name, value, 1);
  }
  if (a.heads % a.groups != 0)
    bad_value("heads", a.heads, "a multiple of groups=" + std::to_string(a.groups));
  check_at_least("taps", a.taps, 2);
  for (const auto& [name, at] : {std::pair{"weights", a.weights},
                                 {"rate", a.rate},
                                 {"offset", a.offset},
                                 {"skip", a.skip},
                                 {"norm", a.norm},
                                 {"past", a.past},
                                 {"state", a.state}}) {
    check_pointer(name, at);
  }
  MambaShape shape{a.heads,
                   a.dim,
                   a.groups,
                   a.states,
                   a.taps,
                   {},
                   {},
                   floats(a.rate, a.heads),
                   floats(a.offset, a.heads),
                   floats(a.skip, a.heads),
                   floats(a.norm, static_cast<int64_t>(a.heads) * a.dim),
                   a.eps,
                   reinterpret_cast<float*>(a.past),
                   reinterpret_cast<float*>(a.state)};
  shape.weights = floats(a.weights, a.taps * shape.channels());
  shape.bias = floats(a.bias, shape.channels());
  const Rows& projected = rows(program, "projected", a.projected, shape.width());
  Rows& out = rows(program, "out", a.out, shape.inner());
  program.add<Mamba>(program.variant(), projected, out, std::move(shape));
}

void bind_experts(Program& program, const ExpertsAddress& a) {
  Rows& x = rows(program, "x", a.x);
  check_at_least("experts", a.experts, 1);
  check_range("top_k", a.top_k, 1, a.experts);
  check_groups("group_size", a.group_size, "width of x", x.width());
  check_groups("down_group_size", a.down_group_size, "intermediate", a.intermediate);
  check_range("group_score", a.group_score, kNoGroups, kTwoLargest);
  if (a.group_score != kNoGroups) {
    check_range("groups", a.groups, 1, a.experts);
    check_range("kept_groups", a.kept_groups, 1, a.groups);
    if (a.experts % a.groups != 0) bad_value("experts", a.experts, "a multiple of groups");
    if (a.experts / a.groups * a.kept_groups < a.top_k)
      bad_value("top_k", a.top_k, "at most the experts kept");
  }
  const auto hidden = static_cast<int>(x.width());
  const int64_t first = (a.gated ? 2 : 1) * static_cast<int64_t>(a.intermediate);
  const Stack gate_up = check_stack("gate_up", a.gate_up, a.experts, first, hidden, a.group_size);
  const Stack down = check_stack("down", a.down, a.experts, hidden, a.intermediate, a.down_group_size);
  RoutingRule rule{a.sigmoid,
                   floats(a.bias, a.experts),
                   static_cast<GroupScore>(a.group_score),
                   a.groups,
                   a.kept_groups,
                   a.normalize,
                   a.epsilon,
                   a.scale,
                   floats(a.expert_scale, a.experts)};
  ExpertsShape shape{gate_up,
                     down,
                     a.experts,
                     a.top_k,
                     hidden,
                     a.intermediate,
                     a.group_size,
                     a.down_group_size,
                     {a.gated, a.slope, a.cubic, a.limit, a.shift},
                     floats(a.gate_up_bias, a.experts * first),
                     floats(a.down_bias, static_cast<int64_t>(a.experts) * hidden),
                     a.onto};
  program.add<Experts>(program.variant(), program.precision(), rows(program, "logits", a.logits, a.experts),
                       x, rows(program, "out", a.out, hidden), std::move(rule), std::move(shape));
}

void bind_run(Program& program, uintptr_t tokens, uintptr_t positions, uintptr_t starts, int64_t slot,
              int threads) {
  check_threads(threads);
  check_pointer("tokens", tokens);
  check_pointer("positions", positions);
  check_pointer("starts", starts);
  check_range("slot", slot, 0, program.limits.slots - 1);
  const StepInput step{reinterpret_cast<const int64_t*>(tokens), reinterpret_cast<const int64_t*>(positions),
                       reinterpret_cast<const int64_t*>(starts), slot};
  for (int64_t row = 0; row < program.batch(); ++row) {
    const std::string at = "[" + std::to_string(row) + "]";
    check_range("tokens" + at, step.tokens[row], 0, program.limits.tokens - 1);
    check_range("positions" + at, step.positions[row], 0, program.limits.positions - 1);
    check_range("starts" + at, step.starts[row], 0, slot);
  }
  program.run(step, threads);
}

}  // namespace gemq
