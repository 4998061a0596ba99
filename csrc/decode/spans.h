// Attention over a cache in spans of slots: each span has a softmax of its own, which are merged at last.
// Spans are of one size whatever the number of threads, so that results are too.
#pragma once

#include <algorithm>
#include <cmath>

#include "decode/operation.h"

namespace gemq {

class Spans {
public:
  // As many keys and values as stay in a near cache.
  static constexpr int64_t kSlots = 256;

  Spans(int64_t batch, int64_t slots, int heads, int dim)
      : most_spans_((slots + kSlots - 1) / kSlots),
        heads_(heads),
        dim_(dim),
        most_(batch * most_spans_ * heads),
        sums_(batch * most_spans_ * heads),
        contexts_(batch * most_spans_ * heads * dim) {}

  void reset(const StepInput& step) { count_ = step.slot / kSlots + 1; }
  int64_t count() const { return count_; }

  // Slots of a span that a row sees; none where all of it is padding.
  static Range slots(const StepInput& step, int64_t row, int64_t span) {
    return {std::max(span * kSlots, step.starts[row]), std::min((span + 1) * kSlots, step.slot + 1)};
  }

  // Where the results of some heads of a span go.
  struct Part {
    float *most, *sums, *contexts;
  };
  Part part(int64_t row, int64_t span, int head) const {
    const int64_t at = (row * most_spans_ + span) * heads_ + head;
    return {most_.get() + at, sums_.get() + at, contexts_.get() + at * dim_};
  }

  // For a span without slots. A sum is 0 only here; elsewhere it is at least 1, or NaN.
  void leave_out(const Part& part, int heads) const {
    std::fill_n(part.most, heads, -INFINITY);
    std::fill_n(part.sums, heads, 0.0f);
  }

  // The softmax over all spans: to[dim].
  void merge(const Kernels& kernels, int64_t row, int head, float* to) const {
    float most = -INFINITY, sum = 0;
    for (int64_t span = 0; span < count_; ++span) most = std::max(most, *part(row, span, head).most);
    std::fill_n(to, dim_, 0.0f);
    for (int64_t span = 0; span < count_; ++span) {
      const Part from = part(row, span, head);
      if (*from.sums == 0) continue;
      const float weight = count_ == 1 ? 1.0f : std::exp(*from.most - most);
      sum += weight * *from.sums;
      kernels.add_scaled(from.contexts, weight, dim_, to);
    }
    const float inverse = 1.0f / sum;
    for (int i = 0; i < dim_; ++i) to[i] *= inverse;
  }

private:
  int64_t most_spans_, count_ = 0;
  int heads_, dim_;
  AlignedFloats most_, sums_, contexts_;
};

}  // namespace gemq
