// Layers with a state instead of a cache: causal convolution, gated delta rule, Mamba-2. Compiled once for
// each instruction set, see moe_cpu/vectors.h.
#include <cmath>

#include "moe_cpu/kernels.h"
#include "moe_cpu/vectors.h"

namespace gemq {
namespace {

GEMQ_INLINE float sigmoid(float v) { return 1.0f / (1.0f + std::exp(-v)); }

// V registers of a head's columns. The old state is read once for key and query; the new one is written while
// these columns are still in the nearest cache.
template <int V>
GEMQ_INLINE void delta_columns(const DeltaArgs& a, float agreement, int first) {
  Float seen[V] = {}, read[V] = {}, change[V];
  float* at = a.state + first;
  for (int i = 0; i < a.keys; ++i, at += a.values) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Float s = load<Float>(at + v * kLanes);
      seen[v] += a.key[i] * s;
      read[v] += a.query[i] * s;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    change[v] = (load<Float>(a.value + first + v * kLanes) - a.decay * seen[v]) * a.beta;
    store(a.out + first + v * kLanes, a.decay * read[v] + agreement * change[v]);
  }
  at = a.state + first;
  for (int i = 0; i < a.keys; ++i, at += a.values) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* const s = at + v * kLanes;
      store(s, a.decay * load<Float>(s) + a.key[i] * change[v]);
    }
  }
}

void delta_column(const DeltaArgs& a, float agreement, int column) {
  float seen = 0, read = 0;
  for (int i = 0; i < a.keys; ++i) {
    const float s = a.state[static_cast<int64_t>(i) * a.values + column];
    seen += a.key[i] * s;
    read += a.query[i] * s;
  }
  const float change = (a.value[column] - a.decay * seen) * a.beta;
  a.out[column] = a.decay * read + agreement * change;
  for (int i = 0; i < a.keys; ++i) {
    float& s = a.state[static_cast<int64_t>(i) * a.values + column];
    s = a.decay * s + a.key[i] * change;
  }
}

}  // namespace

namespace GEMQ_VARIANT {

void gate(const float* gate, bool silu, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Float g = load<Float>(gate + i);
    store(out + i, load<Float>(out + i) * (silu ? g : broadcast(1.0f)) / (exp_float(-g) + 1.0f));
  }
  for (; i < count; ++i) out[i] *= (silu ? gate[i] : 1.0f) * sigmoid(gate[i]);
}

void convolve(const ConvolveArgs& a) {
  const int last = a.taps - 1;
  int i = 0;
  for (; i + kLanes <= a.channels; i += kLanes) {
    const Float x = load<Float>(a.x + i);
    Float sum = a.bias == nullptr ? Float{} : load<Float>(a.bias + i);
    for (int t = 0; t < last; ++t) {
      float* const past = a.past + t * a.stride + i;
      sum += load<Float>(past) * load<Float>(a.weights + t * a.stride + i);
      store(past, t + 1 < last ? load<Float>(past + a.stride) : x);
    }
    sum += x * load<Float>(a.weights + last * a.stride + i);
    store(a.out + i, sum / (exp_float(-sum) + 1.0f));
  }
  for (; i < a.channels; ++i) {
    float sum = a.bias == nullptr ? 0.0f : a.bias[i];
    for (int t = 0; t < last; ++t) {
      float* const past = a.past + t * a.stride + i;
      sum += *past * a.weights[t * a.stride + i];
      *past = t + 1 < last ? past[a.stride] : a.x[i];
    }
    sum += a.x[i] * a.weights[last * a.stride + i];
    a.out[i] = sum * sigmoid(sum);
  }
}

void delta_rule(const DeltaArgs& a) {
  // query times the new state is query times the old one, and (query . key) times the change
  float agreement = 0;
  for (int i = 0; i < a.keys; ++i) agreement += a.query[i] * a.key[i];
  int first = 0;
  for (; first + 4 * kLanes <= a.values; first += 4 * kLanes) delta_columns<4>(a, agreement, first);
  for (; first + kLanes <= a.values; first += kLanes) delta_columns<1>(a, agreement, first);
  for (; first < a.values; ++first) delta_column(a, agreement, first);
}

void state_space(const StateSpaceArgs& a) {
  for (int p = 0; p < a.values; ++p) {
    float* const state = a.state + static_cast<int64_t>(p) * a.states;
    const float scaled = a.step * a.x[p];
    Float sum = {};
    int n = 0;
    for (; n + kLanes <= a.states; n += kLanes) {
      const Float s = a.decay * load<Float>(state + n) + scaled * load<Float>(a.into + n);
      store(state + n, s);
      sum += s * load<Float>(a.from + n);
    }
    float value = total(sum);
    for (; n < a.states; ++n) {
      state[n] = a.decay * state[n] + scaled * a.into[n];
      value += state[n] * a.from[n];
    }
    a.out[p] = value + a.skip * a.x[p];
  }
}

}  // namespace GEMQ_VARIANT
}  // namespace gemq
