// Activations of a batch between the operations of a decode step.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "moe_cpu/activations.h"

namespace gemq {

// Zeroed floats at the start of a cache line.
class AlignedFloats {
public:
  AlignedFloats() = default;
  explicit AlignedFloats(int64_t size) {
    const size_t bytes = (static_cast<size_t>(size) * sizeof(float) + 63) / 64 * 64;
    data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes > 0 ? bytes : 64)));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_.get(), 0, bytes);
  }
  float* get() const { return data_.get(); }

private:
  struct Free {
    void operator()(float* at) const { std::free(at); }
  };
  std::unique_ptr<float[], Free> data_;
};

// float32 rows [count, width], and their integers for the packed products that read them. Rows are padded
// with zeros to whole vectors, unless they are somebody else's memory.
class Rows {
public:
  Rows(const Kernels& kernels, Precision precision, int64_t count, int64_t width, float* external)
      : kernels_(kernels), precision_(precision), count_(count), width_(width) {
    stride_ = external != nullptr ? width : (width + 15) / 16 * 16;
    if (external == nullptr) own_ = AlignedFloats(count * stride_);
    data_ = external != nullptr ? external : own_.get();
  }

  float* row(int64_t i) const { return data_ + i * stride_; }
  int64_t count() const { return count_; }
  int64_t width() const { return width_; }
  int64_t stride() const { return stride_; }

  // The form that packed products with groups of this size read; finish() keeps it up to date.
  Activations& packed(int group_size) {
    for (const auto& form : forms_) {
      if (form->group_size() == group_size) return *form;
    }
    forms_.push_back(std::make_unique<Activations>(kernels_, precision_, count_, static_cast<int>(width_),
                                                   group_size, data_));
    return *forms_.back();
  }

  // After `count` columns of a row were written, whole groups from column `first`.
  void finish(int64_t row_index, int64_t first, int64_t count) {
    for (const auto& form : forms_) {
      form->put(row_index, static_cast<int>(first), row(row_index) + first, static_cast<int>(count));
    }
  }

private:
  const Kernels& kernels_;
  Precision precision_;
  int64_t count_, width_, stride_;
  AlignedFloats own_;
  float* data_;
  std::vector<std::unique_ptr<Activations>> forms_;
};

}  // namespace gemq
