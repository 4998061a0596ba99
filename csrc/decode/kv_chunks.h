// Attention over a cache in chunks of slots: each chunk has a softmax of its own, which are merged at last.
// Chunks are of one size whatever the number of threads, so that results are too.
#pragma once

#include <algorithm>
#include <cmath>

#include "decode/operation.h"

namespace gemq {

// Memory that the attentions of a program use in turn.
class ChunkMemory {
public:
  void need(int64_t floats) {
    if (floats <= held_) return;
    memory_ = AlignedFloats(floats);
    held_ = floats;
  }
  float* get() const { return memory_.get(); }

private:
  AlignedFloats memory_;
  int64_t held_ = 0;
};

class KvChunks {
public:
  // As many keys and values as stay in a near cache.
  static constexpr int64_t kSlots = 256;

  // A window of `slots` tokens holds the token at position p of a row's own text in slot p % slots.
  KvChunks(ChunkMemory& memory, int64_t batch, int64_t slots, int heads, int dim, bool window = false)
      : memory_(memory),
        batch_(batch),
        slots_(slots),
        window_(window),
        most_chunks_((slots + kSlots - 1) / kSlots),
        heads_(heads),
        dim_(dim),
        parts_(batch * most_chunks_ * heads) {
    memory.need(parts_ * (dim + 2));
  }

  void reset(const StepInput& step) {
    int64_t last = window_ ? 0 : step.slot;
    for (int64_t row = 0; window_ && row < batch_; ++row) last = std::max(last, seen(step, row).end - 1);
    count_ = last / kSlots + 1;
  }
  int64_t count() const { return count_; }

  // Where a row's new token goes.
  int64_t newest(const StepInput& step, int64_t row) const {
    return window_ ? step.positions[row] % slots_ : step.slot;
  }

  // Slots of a chunk that a row sees; none where all of it is padding.
  Range slots(const StepInput& step, int64_t row, int64_t chunk) const {
    const Range all = seen(step, row);
    return {std::max(chunk * kSlots, all.begin), std::min((chunk + 1) * kSlots, all.end)};
  }

  // Where the results of some heads of a chunk go.
  struct Part {
    float *most, *sums, *contexts;
  };
  Part part(int64_t row, int64_t chunk, int head) const {
    const int64_t at = (row * most_chunks_ + chunk) * heads_ + head;
    float* const all = memory_.get();
    return {all + at, all + parts_ + at, all + 2 * parts_ + at * dim_};
  }

  // For a chunk without slots. A sum is 0 only here; elsewhere it is at least 1, or NaN.
  void leave_out(const Part& part, int heads) const {
    std::fill_n(part.most, heads, -INFINITY);
    std::fill_n(part.sums, heads, 0.0f);
  }

  // The softmax over all chunks, and over a `sink`, a score without a value: to[dim].
  void merge(const Kernels& kernels, int64_t row, int head, float* to, float sink = -INFINITY) const {
    float most = sink;
    for (int64_t chunk = 0; chunk < count_; ++chunk) most = std::max(most, *part(row, chunk, head).most);
    std::fill_n(to, dim_, 0.0f);
    float sum = sink == -INFINITY ? 0.0f : std::exp(sink - most);
    for (int64_t chunk = 0; chunk < count_; ++chunk) {
      const Part from = part(row, chunk, head);
      if (*from.sums == 0) continue;
      const float weight = *from.most == most ? 1.0f : std::exp(*from.most - most);
      sum += weight * *from.sums;
      kernels.add_scaled(from.contexts, weight, dim_, to);
    }
    const float inverse = 1.0f / sum;
    for (int i = 0; i < dim_; ++i) to[i] *= inverse;
  }

private:
  Range seen(const StepInput& step, int64_t row) const {
    if (!window_) return {step.starts[row], step.slot + 1};
    return {0, std::min(step.positions[row] + 1, slots_)};
  }

  const ChunkMemory& memory_;
  int64_t batch_, slots_;
  bool window_;
  int64_t most_chunks_, count_ = 0;
  int heads_, dim_;
  int64_t parts_;
};

}  // namespace gemq
