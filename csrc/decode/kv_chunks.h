// Attention over a cache in chunks of slots: each chunk has a softmax of its own, which are merged at last.
// Chunks are of one size whatever the number of threads, so that results are too.
#pragma once

#include <algorithm>
#include <cmath>

#include "decode/operation.h"

namespace gemq {

class KvChunks {
public:
  // As many keys and values as stay in a near cache.
  static constexpr int64_t kSlots = 256;

  KvChunks(int64_t batch, int64_t slots, int heads, int dim)
      : most_chunks_((slots + kSlots - 1) / kSlots),
        heads_(heads),
        dim_(dim),
        most_(batch * most_chunks_ * heads),
        sums_(batch * most_chunks_ * heads),
        contexts_(batch * most_chunks_ * heads * dim) {}

  void reset(const StepInput& step) { count_ = step.slot / kSlots + 1; }
  int64_t count() const { return count_; }

  // Slots of a chunk that a row sees; none where all of it is padding.
  static Range slots(const StepInput& step, int64_t row, int64_t chunk) {
    return {std::max(chunk * kSlots, step.starts[row]), std::min((chunk + 1) * kSlots, step.slot + 1)};
  }

  // Where the results of some heads of a chunk go.
  struct Part {
    float *most, *sums, *contexts;
  };
  Part part(int64_t row, int64_t chunk, int head) const {
    const int64_t at = (row * most_chunks_ + chunk) * heads_ + head;
    return {most_.get() + at, sums_.get() + at, contexts_.get() + at * dim_};
  }

  // For a chunk without slots. A sum is 0 only here; elsewhere it is at least 1, or NaN.
  void leave_out(const Part& part, int heads) const {
    std::fill_n(part.most, heads, -INFINITY);
    std::fill_n(part.sums, heads, 0.0f);
  }

  // The softmax over all chunks: to[dim].
  void merge(const Kernels& kernels, int64_t row, int head, float* to) const {
    float most = -INFINITY, sum = 0;
    for (int64_t chunk = 0; chunk < count_; ++chunk) most = std::max(most, *part(row, chunk, head).most);
    std::fill_n(to, dim_, 0.0f);
    for (int64_t chunk = 0; chunk < count_; ++chunk) {
      const Part from = part(row, chunk, head);
      if (*from.sums == 0) continue;
      const float weight = count_ == 1 ? 1.0f : std::exp(*from.most - most);
      sum += weight * *from.sums;
      kernels.add_scaled(from.contexts, weight, dim_, to);
    }
    const float inverse = 1.0f / sum;
    for (int i = 0; i < dim_; ++i) to[i] *= inverse;
  }

private:
  int64_t most_chunks_, count_ = 0;
  int heads_, dim_;
  AlignedFloats most_, sums_, contexts_;
};

}  // namespace gemq
