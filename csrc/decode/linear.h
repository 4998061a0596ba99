// Matrices that share their input, packed or not, in one operation.
#pragma once

#include <vector>

#include "decode/operation.h"
#include "moe_cpu/moe.h"

namespace gemq {

// A linear layer's weights [n, k].
struct Matrix {
  const void* weights;   // packed codes, or elements of `type` when bits is 0
  const uint16_t* meta;  // of packed codes
  int bits, group_size;
  Element type;
  int64_t n;
  std::vector<float> bias;  // empty without one
  Rows* out;
};

// out = x W^T + bias; with `onto` out += sigmoid(gate) * that, the gate a number a row or left out.
class Linear : public Operation {
public:
  Linear(const Kernels& kernels, Rows& x, std::vector<Matrix> matrices, bool onto, const Rows* gate);
  const char* name() const override { return "linear"; }
  void reset(const StepInput&, int threads) override;
  void run(const StepInput&, Team team, float* scratch) override;
  void fetch(Team team) const override;
  int64_t scratch_floats() const override;

private:
  struct Item {
    const Matrix* matrix;
    int64_t block;
    int blocks;
  };
  void product(const Item& item, float* tile) const;
  void put(const Item& item, const float* tile) const;
  const char* start(const Item& item) const;
  int64_t block_bytes(const Matrix& matrix) const;

  const Kernels& kernels_;
  Rows& x_;
  std::vector<Matrix> matrices_;
  bool onto_;
  const Rows* gate_;
  std::vector<Item> items_;
  int threads_ = 0;
  std::vector<int32_t> index_;
};

}  // namespace gemq
