// Where products go: one row a pair, or added up into one row a token, in the element type that was asked
// for.
#pragma once

#include <cstring>

#include "moe_cpu/projection.h"

namespace gemq {

struct Output {
  const Kernels& kernels;
  void* out;  // [tokens, top_k, n], or [tokens, n] when weights is given
  Element type;
  int64_t n;
  int top_k;
  const float* weights;
  int64_t rows;        // of out
  Buffer<float> wide;  // float32 rows where `type` is another
  bool onto = false;   // add to what `out` holds, which is float32

  Output(const Kernels& kernels, void* out, Element type, int64_t n, int top_k, const float* weights,
         int64_t tokens)
      : kernels(kernels),
        out(out),
        type(type),
        n(n),
        top_k(top_k),
        weights(weights),
        rows(weights != nullptr ? tokens : tokens * top_k) {
    if (type != kElementFloat32) wide = Buffer<float>(rows * n);
  }

  float* floats() const { return type == kElementFloat32 ? static_cast<float*>(out) : wide.get(); }

  // Columns of the given blocks.
  Range columns(Range blocks) const {
    const int64_t end = blocks.end * kBlockRows;
    return {blocks.begin * kBlockRows, end < n ? end : n};
  }

  // Zeros whatever the given blocks of columns will not be overwritten with.
  void clear(const Routing& routing, Range blocks) const {
    const Range c = columns(blocks);
    if (c.end <= c.begin || onto) return;
    const auto zero = [&](int64_t row) {
      std::memset(floats() + row * n + c.begin, 0, sizeof(float) * (c.end - c.begin));
    };
    if (weights != nullptr) {
      for (int64_t row = 0; row < rows; ++row) zero(row);
    } else {
      for (const int32_t pair : routing.skipped) zero(pair);
    }
  }

  // Stores or adds 16 values of `pair`.
  void put(int32_t pair, int64_t block, const float* values) const {
    const Range c = columns({block, block + 1});
    const int width = static_cast<int>(c.end - c.begin);
    if (weights == nullptr) {
      std::memcpy(floats() + pair * n + c.begin, values, sizeof(float) * width);
    } else {
      kernels.add_scaled(values, weights[pair], width, floats() + pair / top_k * n + c.begin);
    }
  }

  // Rounds the given blocks of columns to the output's type.
  void finish(Range blocks) const {
    const Range c = columns(blocks);
    if (type == kElementFloat32 || c.end <= c.begin) return;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row * n + c.begin;
      kernels.narrow(wide.get() + at, c.end - c.begin, type, static_cast<uint16_t*>(out) + at);
    }
  }
};

// Columns of the output are shared out in runs of so many blocks.
constexpr int kColumnBlocks = kManyBlocks;

inline int64_t column_runs(int64_t n) { return ceil_div(n, kColumnBlocks * kBlockRows); }

// Every live expert's product for one run of columns; `tile` holds tile_floats of the busiest
// expert's pairs.
// The order of the experts, and so the result, is the same whichever thread has the run.
inline void write_columns(const Projection& projection, const Routing& routing, int64_t run,
                          const Output& output, float* tile) {
  const int64_t first = run * kColumnBlocks, all = ceil_div(output.n, kBlockRows);
  const Range blocks{first, first + kColumnBlocks < all ? first + kColumnBlocks : all};
  output.clear(routing, blocks);
  for (const int e : routing.live) {
    const int begin = routing.starts[e], end = routing.starts[e + 1], count = end - begin;
    Projection::in_runs(blocks, count, [&](int64_t block, int width) {
      projection.product(e, block, width, begin, end, tile);
      for (int i = 0; i < width * count; ++i) {
        output.put(routing.pairs[begin + i % count], block + i / count, tile + i * kBlockRows);
      }
    });
  }
  output.finish(blocks);
}

}  // namespace gemq
