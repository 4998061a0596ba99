// The rows that a projection multiplies, as its kernels read them: float32, or integers with a scale a group.
#pragma once

#include <cstring>
#include <memory>

#include "moe_cpu/kernels.h"

namespace gemq {

// How activations are rounded: not at all, to 16 or to 8 bits a group.
enum Precision : int { kExact = 0, kInt16 = 1, kInt8 = 2 };

// Memory that is written before it is read.
template <class T>
class Buffer {
public:
  Buffer() = default;
  explicit Buffer(int64_t size) : data_(size > 0 ? new T[size] : nullptr) {}
  T* get() const { return data_.get(); }

private:
  std::unique_ptr<T[]> data_;
};

class Activations {
public:
  // `borrowed`: float32 rows that stay in place, or null when rows come through put().
  Activations(const Kernels& kernels, Precision precision, int64_t rows, int k, int group_size,
              const float* borrowed = nullptr)
      : kernels_(kernels),
        k_(k),
        group_size_(group_size),
        integers_(precision != kExact && kernels.integer_product != nullptr),
        terms_(precision == kInt16 ? 2 : 1),
        rows_(rows),
        x_(borrowed),
        sums_(rows * groups()) {
    if (integers_) {
      q_ = Buffer<int8_t>(rows * k * terms_);
      scales_ = Buffer<float>(rows * groups());
    } else if (borrowed == nullptr) {
      own_ = Buffer<float>(rows * k);
      x_ = own_.get();
    }
  }

  int k() const { return k_; }
  int group_size() const { return group_size_; }
  int groups() const { return k_ / group_size_; }
  bool integers() const { return integers_; }

  // Takes `count` columns, whole groups, of a row from column `first`.
  void put(int64_t row, int first, const float* x, int count) {
    if (!integers_ && own_.get() != nullptr)
      std::memcpy(own_.get() + row * k_ + first, x, sizeof(float) * count);
    for (int i = 0; i < count; i += group_size_) {
      const int64_t at = (first + i) / group_size_ * rows_ + row;
      if (integers_) {
        kernels_.quantize(x + i, group_size_, terms_, q_.get() + at * group_size_ * terms_,
                          scales_.get() + at, sums_.get() + at);
      } else {
        sums_.get()[at] = kernels_.group_sum(x + i, group_size_);
      }
    }
  }

  // A row of any element type; `wide` holds k floats.
  void put_row(int64_t row, const void* x, Element type, float* wide) {
    const auto* from = static_cast<const char*>(x) + row * k_ * (type == kElementFloat32 ? 4 : 2);
    if (type == kElementFloat32) return put(row, 0, reinterpret_cast<const float*>(from), k_);
    kernels_.widen(from, type, k_, wide);
    put(row, 0, wide, k_);
  }

  RowsView view(const int32_t* index, int count) const {
    return {x_, q_.get(), terms_, scales_.get(), sums_.get(), rows_, index, count};
  }

private:
  const Kernels& kernels_;
  int k_, group_size_;
  bool integers_;
  int terms_;
  int64_t rows_;
  const float* x_;
  Buffer<float> own_, scales_, sums_;
  Buffer<int8_t> q_;
};

}  // namespace gemq
