// A decode step as a list of operations, bound once to the weights, the cache and a batch, and run with one
// call a token by one team of threads.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "decode/attend.h"
#include "decode/attend_latent.h"
#include "decode/delta_net.h"
#include "decode/embed_norm_activate.h"
#include "decode/experts.h"
#include "decode/linear.h"
#include "decode/mamba.h"

namespace gemq {

class Program {
public:
  // For the variant of the kernels in use now.
  Program(int64_t batch, Precision precision) : kernels_(kernels()), batch_(batch), precision_(precision) {}
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  int64_t batch() const { return batch_; }
  Precision precision() const { return precision_; }
  const Kernels& variant() const { return kernels_; }

  // Rows [batch, width], in the program's memory or at `external`; returns their number.
  int buffer(int64_t width, float* external);
  int buffers() const { return static_cast<int>(rows_.size()); }
  Rows& rows(int number) { return *rows_[number]; }

  ChunkMemory& chunk_memory() { return chunk_memory_; }

  template <class Op, class... Args>
  void add(Args&&... args) {
    operations_.push_back(std::make_unique<Op>(std::forward<Args>(args)...));
  }

  // Slots of the cache, rows of the rotary tables and of the embedding that the operations can use: what
  // run()'s caller checks its input against.
  struct Limits {
    int64_t slots = INT64_MAX, positions = INT64_MAX, tokens = INT64_MAX;
  } limits;

  void run(const StepInput& step, int threads);

  // Whether run() measures its operations, and seconds and calls by name since it was told to.
  void measure(bool on);
  std::vector<std::pair<std::string, double>> seconds() const;

private:
  ChunkMemory chunk_memory_;
  const Kernels& kernels_;
  int64_t batch_;
  Precision precision_;
  std::vector<std::unique_ptr<Rows>> rows_;
  std::vector<std::unique_ptr<Operation>> operations_;
  AlignedFloats scratch_;
  int64_t scratch_held_ = 0;
  bool measured_ = false;
  std::vector<double> seconds_;
};

}  // namespace gemq
