#include "decode/experts.h"

#include <algorithm>

namespace gemq {

Experts::Experts(const Kernels& kernels, Precision precision, const Rows& logits, Rows& x, Rows& out,
                 RoutingRule rule, ExpertsShape shape)
    : logits_(logits),
      out_(out),
      rule_(std::move(rule)),
      shape_(std::move(shape)),
      ids_(x.count() * shape_.top_k),
      weights_(x.count() * shape_.top_k),
      scratch_(x.count()),
      inner_(kernels, precision, x.count() * shape_.top_k, shape_.intermediate, shape_.down_group_size),
      ffn_{kernels,
           shape_.activation,
           shape_.intermediate,
           shape_.down_group_size,
           routing_,
           {kernels,
            shape_.gate_up,
            x.packed(shape_.group_size),
            {},
            shape_.gate_up_bias.empty() ? nullptr : shape_.gate_up_bias.data(),
            (shape_.activation.gated ? 2 : 1) * static_cast<int64_t>(shape_.intermediate)},
           {kernels,
            shape_.down,
            inner_,
            {},
            shape_.down_bias.empty() ? nullptr : shape_.down_bias.data(),
            shape_.hidden}},
      output_(kernels, out.row(0), kElementFloat32, shape_.hidden, shape_.top_k, weights_.data(), x.count()) {
  output_.onto = shape_.onto;
}

int64_t Experts::scratch_floats() const {
  return Ffn::scratch_size(static_cast<int>(logits_.count()), shape_.down_group_size);
}

void Experts::reset(const StepInput&, int threads) {
  threads_ = threads;
  chosen_.store(0, std::memory_order_relaxed);
  rows_.reset(logits_.count(), threads);
  last_.reset(column_runs(shape_.hidden), threads);
}

// Whoever is the last to choose sorts the choices of all.
void Experts::choose(int64_t row) {
  const int64_t at = row * shape_.top_k;
  choose_experts(rule_, logits_.row(row), shape_.experts, shape_.top_k, ids_.data() + at,
                 weights_.data() + at, scratch_[row]);
  if (chosen_.fetch_add(1, std::memory_order_acq_rel) + 1 < logits_.count()) return;
  const auto lives = [this](int e) { return shape_.down.bits[e] > 0; };
  routing_.fill(ids_.data(), static_cast<int64_t>(ids_.size()), shape_.experts, lives);
  ffn_.take_rows(shape_.top_k);
  groups_.reset(ffn_.inner_items(), threads_);
}

void Experts::run(const StepInput&, Team team, float* scratch) {
  rows_.work(team, [&](int64_t row) { choose(row); });
  rows_.wait();
  const Ffn::Scratch own = Ffn::scratch(scratch, routing_.most);
  groups_.work(team, [&](int64_t item) { ffn_.inner_group(item, own); });
  groups_.wait();
  last_.work(team, [&](int64_t run) {
    write_columns(ffn_.down, routing_, run, output_, own.gate);
    const int64_t first = run * kColumnBlocks * kBlockRows;
    const int64_t count = std::min<int64_t>(kColumnBlocks * kBlockRows, shape_.hidden - first);
    for (int64_t row = 0; row < out_.count(); ++row) out_.finish(row, first, count);
  });
}

}  // namespace gemq
