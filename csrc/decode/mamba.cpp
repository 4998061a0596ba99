#include "decode/mamba.h"

#include <algorithm>
#include <cmath>

#include "decode/scalars.h"

namespace gemq {

Mamba::Mamba(const Kernels& kernels, const Rows& projected, Rows& out, MambaShape shape)
    : kernels_(kernels),
      projected_(projected),
      out_(out),
      shape_(std::move(shape)),
      mixed_(out.count() * shape_.channels()) {}

void Mamba::reset(const StepInput&, int threads) {
  convolutions_.reset(out_.count() * runs(), threads);
  heads_.reset(out_.count() * shape_.heads, threads);
  last_.reset(out_.count(), threads);
}

void Mamba::run(const StepInput&, Team team, float*) {
  convolutions_.work(team, [&](int64_t item) { convolve(item / runs(), item % runs() * kChannels); });
  convolutions_.wait();
  heads_.work(team, [&](int64_t item) { head(item / shape_.heads, static_cast<int>(item % shape_.heads)); });
  heads_.wait();
  last_.work(team, [&](int64_t row) { norm(row); });
}

void Mamba::convolve(int64_t row, int64_t first) {
  const int64_t channels = shape_.channels();
  kernels_.convolve({projected_.row(row) + shape_.inner() + first,
                     shape_.past + row * (shape_.taps - 1) * channels + first, shape_.weights.data() + first,
                     shape_.bias.empty() ? nullptr : shape_.bias.data() + first, shape_.taps,
                     static_cast<int>(std::min(kChannels, channels - first)), channels,
                     mixed_.get() + row * channels + first});
}

void Mamba::head(int64_t row, int head) {
  const float* mixed = mixed_.get() + row * shape_.channels();
  const float* into =
      mixed + shape_.inner() + static_cast<int64_t>(head / (shape_.heads / shape_.groups)) * shape_.states;
  const float step =
      softplus(projected_.row(row)[shape_.inner() + shape_.channels() + head] + shape_.offset[head]);
  kernels_.state_space({shape_.state + (row * shape_.heads + head) * shape_.dim * shape_.states, shape_.dim,
                        shape_.states, mixed + static_cast<int64_t>(head) * shape_.dim, into,
                        into + shape_.shared(), std::exp(shape_.rate[head] * step), step, shape_.skip[head],
                        out_.row(row) + static_cast<int64_t>(head) * shape_.dim});
}

void Mamba::norm(int64_t row) {
  float* const out = out_.row(row);
  kernels_.gate(projected_.row(row), true, shape_.inner(), out);
  const int64_t size = shape_.inner() / shape_.groups;
  for (int64_t first = 0; first < shape_.inner(); first += size) {
    kernels_.rms_norm(out + first, shape_.norm.data() + first, size, shape_.eps, out + first);
  }
  out_.finish(row, 0, out_.width());
}

}  // namespace gemq
