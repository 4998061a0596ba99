#include "decode/delta_net.h"

#include <cmath>

#include "decode/scalars.h"

namespace gemq {

namespace {
// added to the squared length of a query or key
constexpr float kLengthEps = 1e-6f;
}  // namespace

// A vector of length 1 is its RMS norm over the root of its size; queries are divided by that root once more.
DeltaNet::DeltaNet(const Kernels& kernels, Rows& out, DeltaShape shape)
    : kernels_(kernels),
      out_(out),
      shape_(std::move(shape)),
      query_scale_(shape_.key_dim, 1.0f / static_cast<float>(shape_.key_dim)),
      key_scale_(shape_.key_dim, 1.0f / std::sqrt(static_cast<float>(shape_.key_dim))) {}

void DeltaNet::reset(const StepInput&, int threads) {
  parts_.reset(out_.count() * shape_.key_heads, threads);
  last_.reset(out_.count(), threads);
}

void DeltaNet::run(const StepInput&, Team team, float* scratch) {
  parts_.work(team, [&](int64_t item) {
    heads(item / shape_.key_heads, static_cast<int>(item % shape_.key_heads), scratch);
  });
  parts_.wait();
  last_.work(team, [&](int64_t row) { out_.finish(row, 0, out_.width()); });
}

// `count` channels from `first` on, one key head's.
void DeltaNet::convolve(int64_t row, const DeltaShape::Part& part, int head, int64_t first, int64_t count,
                        float* to) {
  const int64_t channels = shape_.channels(), at = first + head * count;
  kernels_.convolve({part.rows->row(row) + part.offset + head * part.stride,
                     shape_.past + row * (shape_.taps - 1) * channels + at, shape_.weights.data() + at,
                     nullptr, shape_.taps, static_cast<int>(count), channels, to});
}

// A key head and the value heads that share it.
void DeltaNet::heads(int64_t row, int head, float* scratch) {
  const int64_t shared = shape_.heads_a_key(), dim = shape_.value_dim;
  float *query = scratch, *key = query + shape_.key_dim, *value = key + shape_.key_dim;
  convolve(row, shape_.query, head, 0, shape_.key_dim, query);
  convolve(row, shape_.key, head, shape_.keys(), shape_.key_dim, key);
  convolve(row, shape_.value, head, 2 * shape_.keys(), shared * dim, value);
  const float eps = kLengthEps / static_cast<float>(shape_.key_dim);
  kernels_.rms_norm(query, query_scale_.data(), shape_.key_dim, eps, query);
  kernels_.rms_norm(key, key_scale_.data(), shape_.key_dim, eps, key);
  const auto number = [&](const DeltaShape::Part& part) {
    return part.rows->row(row) + part.offset + head * part.stride;
  };
  const float *beta = number(shape_.beta), *decay = number(shape_.decay), *gate = number(shape_.gate);
  for (int64_t i = 0; i < shared; ++i) {
    const int64_t h = head * shared + i;
    const float step = softplus(decay[i] + shape_.offset[h]);
    float* const to = out_.row(row) + h * dim;
    float* const state = shape_.state + (row * shape_.value_heads + h) * shape_.key_dim * dim;
    kernels_.delta_rule({state, shape_.key_dim, shape_.value_dim, query, key, value + i * dim,
                         std::exp(shape_.rate[h] * step), sigmoid(beta[i]), to});
    kernels_.rms_norm(to, shape_.norm.data(), dim, shape_.eps, to);
    kernels_.gate(gate + i * dim, true, dim, to);
  }
}

}  // namespace gemq
