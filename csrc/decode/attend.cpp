#include "decode/attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace gemq {

Attend::Attend(const Kernels& kernels, const Rows& query, const Rows& key, const Rows& value, Rows& out,
               AttentionShape shape)
    : kernels_(kernels), query_(query), key_(key), value_(value), out_(out), shape_(std::move(shape)) {
  const int64_t parts = out.count() * most_spans() * shape_.heads;
  most_ = AlignedFloats(parts);
  sums_ = AlignedFloats(parts);
  contexts_ = AlignedFloats(parts * shape_.dim);
}

int64_t Attend::scratch_floats() const {
  return heads_a_group() * (shape_.dim + score_stride(kSpan)) + shape_.dim;
}

void Attend::reset(const StepInput& step, int threads) {
  spans_ = step.slot / kSpan + 1;
  parts_.reset(out_.count() * shape_.groups * spans_, threads);
  last_.reset(out_.count(), threads);
}

void Attend::run(const StepInput& step, Team team, float* scratch) {
  parts_.work(team, [&](int64_t item) { attend_span(step, item, scratch); });
  parts_.wait();
  last_.work(team, [&](int64_t row) { merge(row); });
}

void Attend::store_new(const StepInput& step, int64_t row, int group, float* scratch) {
  const int dim = shape_.dim;
  const int64_t at = ((row * shape_.groups + group) * shape_.slots + step.slot) * dim;
  const int64_t angle = step.positions[row] * shape_.rotary;
  const float* key = key_.row(row) + group * dim;
  float* turned = scratch;
  if (!shape_.key_norm.empty()) {
    kernels_.rms_norm(key, shape_.key_norm.data(), dim, shape_.eps, turned);
    key = turned;
  }
  kernels_.rotate(key, shape_.cosines + angle, shape_.sines + angle, shape_.rotary, dim, turned);
  const float* value = value_.row(row) + group * dim;
  if (shape_.type == kElementFloat32) {
    std::memcpy(static_cast<float*>(shape_.keys) + at, turned, sizeof(float) * dim);
    std::memcpy(static_cast<float*>(shape_.values) + at, value, sizeof(float) * dim);
  } else {
    kernels_.narrow(turned, dim, shape_.type, static_cast<uint16_t*>(shape_.keys) + at);
    kernels_.narrow(value, dim, shape_.type, static_cast<uint16_t*>(shape_.values) + at);
  }
}

void Attend::attend_span(const StepInput& step, int64_t item, float* scratch) {
  const int64_t span = item % spans_, row = item / spans_ / shape_.groups;
  const int group = static_cast<int>(item / spans_ % shape_.groups), heads = heads_a_group(),
            dim = shape_.dim;
  float *queries = scratch, *scores = queries + heads * dim, *turned = scores + heads * score_stride(kSpan);
  // the newest key and value belong to the last span
  if (span + 1 == spans_) store_new(step, row, group, turned);
  const int64_t angle = step.positions[row] * shape_.rotary;
  for (int h = 0; h < heads; ++h) {
    const float* query = query_.row(row) + (group * heads + h) * dim;
    float* to = queries + h * dim;
    if (!shape_.query_norm.empty()) {
      kernels_.rms_norm(query, shape_.query_norm.data(), dim, shape_.eps, to);
      query = to;
    }
    kernels_.rotate(query, shape_.cosines + angle, shape_.sines + angle, shape_.rotary, dim, to);
  }
  const int64_t first = std::max(span * kSpan, step.starts[row]),
                end = std::min((span + 1) * kSpan, step.slot + 1);
  const int64_t part = partial(row, span, group * heads);
  if (first >= end) {
    std::fill_n(most_.get() + part, heads, -INFINITY);
    std::fill_n(sums_.get() + part, heads, 0.0f);
    return;
  }
  const int64_t at =
      ((row * shape_.groups + group) * shape_.slots + first) * dim * element_bytes(shape_.type);
  kernels_.attend({queries, heads, dim, static_cast<const char*>(shape_.keys) + at,
                   static_cast<const char*>(shape_.values) + at, shape_.type, end - first, shape_.scale,
                   scores, most_.get() + part, sums_.get() + part, contexts_.get() + part * dim});
}

// A span of padding alone has a sum of 0; of any other it is at least 1, or NaN.
void Attend::merge(int64_t row) {
  const int dim = shape_.dim;
  for (int h = 0; h < shape_.heads; ++h) {
    float most = -INFINITY, sum = 0;
    for (int64_t span = 0; span < spans_; ++span) most = std::max(most, most_.get()[partial(row, span, h)]);
    float* to = out_.row(row) + h * dim;
    std::fill_n(to, dim, 0.0f);
    for (int64_t span = 0; span < spans_; ++span) {
      const int64_t part = partial(row, span, h);
      if (sums_.get()[part] == 0) continue;
      const float weight = spans_ == 1 ? 1.0f : std::exp(most_.get()[part] - most);
      sum += weight * sums_.get()[part];
      kernels_.add_scaled(contexts_.get() + part * dim, weight, dim, to);
    }
    const float inverse = 1.0f / sum;
    for (int i = 0; i < dim; ++i) to[i] *= inverse;
  }
  out_.finish(row, 0, out_.width());
}

}  // namespace gemq
