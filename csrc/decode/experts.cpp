#include "decode/experts.h"

namespace gemq {

Experts::Experts(const Kernels& kernels, Precision precision, const Rows& logits, Rows& x, Rows& out,
                 RoutingRule rule, const ExpertsShape& shape)
    : logits_(logits),
      rule_(std::move(rule)),
      shape_(shape),
      ids_(x.count() * shape.top_k),
      weights_(x.count() * shape.top_k),
      scratch_(x.count()),
      inner_(kernels, precision, x.count() * shape.top_k, shape.intermediate, shape.down_group_size),
      ffn_{kernels,
           {},
           shape.intermediate,
           shape.down_group_size,
           routing_,
           {kernels, shape.gate_up, x.packed(shape.group_size), {}, nullptr, 0},
           {kernels, shape.down, inner_, {}, nullptr, 0}},
      output_(kernels, out.row(0), kElementFloat32, shape.hidden, shape.top_k, weights_.data(), x.count()) {
  output_.onto = true;
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
  last_.work(team, [&](int64_t run) { write_columns(ffn_.down, routing_, run, output_, own.gate); });
}

}  // namespace gemq
