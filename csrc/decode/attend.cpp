#include "decode/attend.h"

#include <cstring>

namespace gemq {

Attend::Attend(const Kernels& kernels, ChunkMemory& memory, const Rows& query, const Rows& key,
               const Rows& value, Rows& out, AttentionShape shape)
    : kernels_(kernels),
      query_(query),
      key_(key),
      value_(value),
      out_(out),
      shape_(std::move(shape)),
      chunks_(memory, out.count(), shape_.slots, shape_.heads, shape_.dim, shape_.window) {}

int64_t Attend::scratch_floats() const {
  return heads_a_group() * (shape_.dim + score_stride(KvChunks::kSlots)) + 2 * shape_.dim;
}

void Attend::reset(const StepInput& step, int threads) {
  chunks_.reset(step);
  parts_.reset(out_.count() * shape_.groups * chunks_.count(), threads);
  last_.reset(out_.count(), threads);
}

void Attend::run(const StepInput& step, Team team, float* scratch) {
  parts_.work(team, [&](int64_t item) { attend_chunk(step, item, scratch); });
  parts_.wait();
  last_.work(team, [&](int64_t row) {
    for (int h = 0; h < shape_.heads; ++h) {
      float* const to = out_.row(row) + h * shape_.dim;
      chunks_.merge(kernels_, row, h, to, shape_.sinks.empty() ? -INFINITY : shape_.sinks[h]);
      if (shape_.gated)
        kernels_.gate(query_.row(row) + h * shape_.query_dim() + shape_.dim, false, shape_.dim, to);
    }
    out_.finish(row, 0, out_.width());
  });
}

void Attend::store_new(const StepInput& step, int64_t row, int group, float* scratch) {
  const int dim = shape_.dim;
  const int64_t at = ((row * shape_.groups + group) * shape_.slots + chunks_.newest(step, row)) * dim;
  const int64_t angle = step.positions[row] * shape_.rotary;
  const float* key = key_.row(row) + group * dim;
  float* turned = scratch;
  if (!shape_.key_norm.empty()) {
    kernels_.rms_norm(key, shape_.key_norm.data(), dim, shape_.eps, turned);
    key = turned;
  }
  kernels_.rotate(key, shape_.cosines + angle, shape_.sines + angle, shape_.rotary, dim, turned);
  const float* value = value_.row(row) + group * dim;
  float* const normed = scratch + dim;
  if (!shape_.value_norm.empty()) {
    kernels_.rms_norm(value, shape_.value_norm.data(), dim, shape_.eps, normed);
    value = normed;
  }
  if (shape_.type == kElementFloat32) {
    std::memcpy(static_cast<float*>(shape_.keys) + at, turned, sizeof(float) * dim);
    std::memcpy(static_cast<float*>(shape_.values) + at, value, sizeof(float) * dim);
  } else {
    kernels_.narrow(turned, dim, shape_.type, static_cast<uint16_t*>(shape_.keys) + at);
    kernels_.narrow(value, dim, shape_.type, static_cast<uint16_t*>(shape_.values) + at);
  }
}

void Attend::attend_chunk(const StepInput& step, int64_t item, float* scratch) {
  const int64_t chunk = item % chunks_.count(), row = item / chunks_.count() / shape_.groups;
  const int group = static_cast<int>(item / chunks_.count() % shape_.groups), heads = heads_a_group();
  const int dim = shape_.dim;
  float *queries = scratch, *scores = queries + heads * dim;
  const Range slots = chunks_.slots(step, row, chunk);
  const int64_t newest = chunks_.newest(step, row);
  if (slots.begin <= newest && newest < slots.end)
    store_new(step, row, group, scores + heads * score_stride(KvChunks::kSlots));
  const int64_t angle = step.positions[row] * shape_.rotary;
  for (int h = 0; h < heads; ++h) {
    const float* query = query_.row(row) + (group * heads + h) * shape_.query_dim();
    float* to = queries + h * dim;
    if (!shape_.query_norm.empty()) {
      kernels_.rms_norm(query, shape_.query_norm.data(), dim, shape_.eps, to);
      query = to;
    }
    kernels_.rotate(query, shape_.cosines + angle, shape_.sines + angle, shape_.rotary, dim, to);
  }
  const KvChunks::Part part = chunks_.part(row, chunk, group * heads);
  if (slots.begin >= slots.end) return chunks_.leave_out(part, heads);
  const int64_t at =
      ((row * shape_.groups + group) * shape_.slots + slots.begin) * dim * element_bytes(shape_.type);
  kernels_.attend({queries, heads, dim, static_cast<const char*>(shape_.keys) + at,
                   static_cast<const char*>(shape_.values) + at, nullptr, 0, shape_.type,
                   slots.end - slots.begin, shape_.scale, scores, part.most, part.sums, part.contexts});
}

}  // namespace gemq
