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

// A causal convolution of one new number a channel, each channel with weights of its own, and SiLU.
struct ConvolveArgs {
  const float* x;        // [channels]
  float* past;           // [taps - 1, stride]: the numbers before, oldest first; moved on
  const float* weights;  // [taps, stride]
  const float* bias;     // [channels], or null
  int taps, channels;
  int64_t stride;
  float* out;  // [channels]
};

// The gated delta rule for one head: state = decay * state + key (beta * (value - decay * key state)).
struct DeltaArgs {
  float* state;  // [keys, values]
  int keys, values;
  const float *query, *key, *value;
  float decay, beta;
  float* out;  // [values]: query times the new state
};

// Mamba-2's recurrence for one head: state = decay * state + step * x into.
struct StateSpaceArgs {
  float* state;  // [values, states]
  int values, states;
  const float* x;            // [values]
  const float *into, *from;  // [states]
  float decay, step, skip;
  float* out;  // [values]: the new state times `from`, and skip * x
};

constexpr int64_t score_stride(int64_t count) { return (count + 15) / 16 * 16; }

}  // namespace gemq
