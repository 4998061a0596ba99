// What a decode step computes beside the packed products, as arguments of the vector kernels.
#pragma once

#include <cstdint>

#include "gemq/element.h"

namespace gemq {

// Rows of an unquantized matrix against a few rows of float32 activations.
struct DenseArgs {
  const void* weights;  // [rows, k]
  Element type;
  int rows, k;
  const float* x;    // [tokens, stride]
  int64_t x_stride;  // floats
  int tokens;
};
// dense_product writes out[block][token][16], rows in blocks of 16 as the packed products do.

// Query heads that share a key, against a chunk of one row's cache.
struct AttendArgs {
  const float* queries;  // [heads, dim + more], rotated
  int heads, dim;
  const void *keys, *values;  // [count, dim]
  const void* more_keys;      // [count, more]: what keys have beyond `dim` and values have not
  int more;
  Element type;  // of keys and values
  int64_t count;
  float scale;
  float* scores;  // [heads, score_stride(count)], for the kernel's own use
  float* most;    // [heads]: the largest score
  float* sums;    // [heads]: of e^(score - most)
  float* out;     // [heads, dim]: values weighted with these
};

constexpr int64_t score_stride(int64_t count) { return (count + 15) / 16 * 16; }

}  // namespace gemq
