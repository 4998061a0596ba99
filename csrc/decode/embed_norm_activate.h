// Operations row by row: embedding, RMSNorm, activation.
#pragma once

#include <vector>

#include "decode/operation.h"
#include "pack/packed_rows.h"

namespace gemq {

// out = scale * the token's row of the table
class Embed : public Operation {
public:
  Embed(const Kernels& kernels, const void* table, Element type, float scale, Rows& out)
      : kernels_(kernels), table_(static_cast<const char*>(table)), type_(type), scale_(scale), out_(out) {}
  const char* name() const override { return "embed"; }
  void reset(const StepInput&, int threads) override { last_.reset(out_.count(), threads); }
  void run(const StepInput& step, Team team, float*) override;

private:
  const Kernels& kernels_;
  const char* table_;
  Element type_;
  float scale_;
  Rows& out_;
};

// out = scale * the token's row of a packed table
class EmbedPacked : public Operation {
public:
  EmbedPacked(const PackedTable& table, float scale, Rows& out) : table_(table), scale_(scale), out_(out) {}
  const char* name() const override { return "embed"; }
  void reset(const StepInput&, int threads) override { last_.reset(out_.count(), threads); }
  void run(const StepInput& step, Team team, float*) override;

private:
  PackedTable table_;
  float scale_;
  Rows& out_;
};

// out = weight * x / sqrt(mean(x^2) + eps); with `onto` that is added to out, and all of it multiplied by
// `scale`. Else out may be x.
class Norm : public Operation {
public:
  Norm(const Kernels& kernels, const Rows& x, std::vector<float> weight, float eps, Rows& out, bool onto,
       float scale)
      : kernels_(kernels),
        x_(x),
        weight_(std::move(weight)),
        eps_(eps),
        out_(out),
        onto_(onto),
        scale_(scale) {}
  const char* name() const override { return "norm"; }
  void reset(const StepInput&, int threads) override { last_.reset(x_.count(), threads); }
  void run(const StepInput&, Team team, float* scratch) override;
  int64_t scratch_floats() const override { return onto_ ? x_.width() : 0; }

private:
  const Kernels& kernels_;
  const Rows& x_;
  std::vector<float> weight_;
  float eps_;
  Rows& out_;
  bool onto_;
  float scale_;
};

// out = the activation of gate and up; without a gate, of up
class Activate : public Operation {
public:
  Activate(const Kernels& kernels, const Activation& how, const Rows& gate, const Rows& up, Rows& out)
      : kernels_(kernels), how_(how), gate_(gate), up_(up), out_(out) {}
  const char* name() const override { return "activate"; }
  void reset(const StepInput&, int threads) override { last_.reset(out_.count() * runs(), threads); }
  void run(const StepInput&, Team team, float*) override;

private:
  // columns an item: whole groups of any size
  static constexpr int64_t kColumns = 512;
  int64_t runs() const { return (out_.width() + kColumns - 1) / kColumns; }

  const Kernels& kernels_;
  Activation how_;
  const Rows &gate_, &up_;
  Rows& out_;
};

}  // namespace gemq
