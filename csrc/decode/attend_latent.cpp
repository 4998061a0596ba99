#include "decode/attend_latent.h"

#include <cstring>

namespace gemq {

AttendLatent::AttendLatent(const Kernels& kernels, ChunkMemory& memory, const Rows& query, const Rows& latent,
                           Rows& out, LatentShape shape)
    : kernels_(kernels),
      query_(query),
      latent_(latent),
      out_(out),
      shape_(std::move(shape)),
      chunks_(memory, out.count(), shape_.slots, shape_.heads, shape_.rank, shape_.window),
      folded_(kernels, kExact, out.count(), static_cast<int64_t>(shape_.heads) * key_size(), nullptr),
      contexts_(kernels, kExact, out.count(), static_cast<int64_t>(shape_.heads) * shape_.rank, nullptr) {}

int64_t AttendLatent::scratch_floats() const {
  const int64_t tile = out_.count() * score_stride(std::max(shape_.rank, shape_.v_dim));
  return std::max({tile, kHeads * score_stride(KvChunks::kSlots), static_cast<int64_t>(key_size())});
}

void AttendLatent::reset(const StepInput& step, int threads) {
  chunks_.reset(step);
  folds_.reset(shape_.heads + out_.count(), threads);
  parts_.reset(out_.count() * head_runs() * chunks_.count(), threads);
  merges_.reset(out_.count() * shape_.heads, threads);
  expansions_.reset(shape_.heads, threads);
  last_.reset(out_.count(), threads);
}

void AttendLatent::run(const StepInput& step, Team team, float* scratch) {
  folds_.work(team, [&](int64_t item) {
    item < shape_.heads ? fold(step, static_cast<int>(item), scratch)
                        : store_new(step, item - shape_.heads, scratch);
  });
  folds_.wait();
  parts_.work(team, [&](int64_t item) { attend_chunk(step, item, scratch); });
  parts_.wait();
  merges_.work(team, [&](int64_t item) {
    const int64_t row = item / shape_.heads;
    const int head = static_cast<int>(item % shape_.heads);
    chunks_.merge(kernels_, row, head, contexts_.row(row) + head * shape_.rank);
  });
  merges_.wait();
  expansions_.work(team, [&](int64_t head) { expand(static_cast<int>(head), scratch); });
  expansions_.wait();
  last_.work(team, [&](int64_t row) { out_.finish(row, 0, out_.width()); });
}

// Neighbours (x[2i], x[2i + 1]) turn together.
void AttendLatent::turn(const StepInput& step, int64_t row, const float* from, float* to) const {
  const int half = shape_.rope / 2;
  const float* cosines = shape_.cosines + step.positions[row] * half;
  const float* sines = shape_.sines + step.positions[row] * half;
  for (int i = 0; i < half; ++i) {
    const float even = from[2 * i], odd = from[2 * i + 1];
    to[shape_.apart ? i : 2 * i] = even * cosines[i] - odd * sines[i];
    to[shape_.apart ? i + half : 2 * i + 1] = even * sines[i] + odd * cosines[i];
  }
}

// One head's queries of all rows, as what the latents are multiplied with.
void AttendLatent::fold(const StepInput& step, int head, float* scratch) {
  const int64_t at = static_cast<int64_t>(head) * (shape_.nope + shape_.rope);
  const auto* into = static_cast<const char*>(shape_.into) + static_cast<int64_t>(head) * shape_.rank *
                                                                 shape_.nope *
                                                                 element_bytes(shape_.expand_type);
  const auto batch = static_cast<int>(out_.count());
  kernels_.dense_product(
      {into, shape_.expand_type, shape_.rank, shape_.nope, query_.row(0) + at, query_.stride(), batch},
      scratch);
  for (int64_t row = 0; row < batch; ++row) {
    float* to = folded_.row(row) + static_cast<int64_t>(head) * key_size();
    for (int i = 0; i < shape_.rank; ++i) to[i] = scratch[(i / 16 * batch + row) * 16 + i % 16];
    turn(step, row, query_.row(row) + at + shape_.nope, to + shape_.rank);
  }
}

void AttendLatent::store_new(const StepInput& step, int64_t row, float* scratch) {
  kernels_.rms_norm(latent_.row(row), shape_.norm.data(), shape_.rank, shape_.eps, scratch);
  turn(step, row, latent_.row(row) + shape_.rank, scratch + shape_.rank);
  const auto put = [&](const float* from, int64_t count, void* cache) {
    const int64_t at = (row * shape_.slots + chunks_.newest(step, row)) * count;
    if (shape_.type == kElementFloat32) {
      std::memcpy(static_cast<float*>(cache) + at, from, sizeof(float) * count);
    } else {
      kernels_.narrow(from, count, shape_.type, static_cast<uint16_t*>(cache) + at);
    }
  };
  put(scratch, shape_.rank, shape_.latents);
  put(scratch + shape_.rank, shape_.rope, shape_.ropes);
}

void AttendLatent::attend_chunk(const StepInput& step, int64_t item, float* scratch) {
  const int64_t chunk = item % chunks_.count(), row = item / chunks_.count() / head_runs();
  const int first = static_cast<int>(item / chunks_.count() % head_runs()) * kHeads;
  const int heads = std::min(kHeads, shape_.heads - first);
  const Range slots = chunks_.slots(step, row, chunk);
  const KvChunks::Part part = chunks_.part(row, chunk, first);
  if (slots.begin >= slots.end) return chunks_.leave_out(part, heads);
  const int64_t at = (row * shape_.slots + slots.begin) * element_bytes(shape_.type);
  const auto* latents = static_cast<const char*>(shape_.latents) + at * shape_.rank;
  const auto* ropes = static_cast<const char*>(shape_.ropes) + at * shape_.rope;
  kernels_.attend({folded_.row(row) + static_cast<int64_t>(first) * key_size(), heads, shape_.rank, latents,
                   latents, ropes, shape_.rope, shape_.type, slots.end - slots.begin, shape_.scale, scratch,
                   part.most, part.sums, part.contexts});
}

void AttendLatent::expand(int head, float* scratch) {
  const auto* from = static_cast<const char*>(shape_.from) + static_cast<int64_t>(head) * shape_.v_dim *
                                                                 shape_.rank *
                                                                 element_bytes(shape_.expand_type);
  const auto batch = static_cast<int>(out_.count());
  kernels_.dense_product(
      {from, shape_.expand_type, shape_.v_dim, shape_.rank,
       contexts_.row(0) + static_cast<int64_t>(head) * shape_.rank, contexts_.stride(), batch},
      scratch);
  for (int64_t row = 0; row < batch; ++row) {
    float* to = out_.row(row) + static_cast<int64_t>(head) * shape_.v_dim;
    for (int i = 0; i < shape_.v_dim; ++i) to[i] = scratch[(i / 16 * batch + row) * 16 + i % 16];
  }
}

}  // namespace gemq
