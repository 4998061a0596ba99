#include "decode/embed_norm_activate.h"

#include <algorithm>
#include <cstring>

namespace gemq {

void Embed::run(const StepInput& step, Team team, float*) {
  last_.work(team, [&](int64_t row) {
    const int64_t bytes = out_.width() * element_bytes(type_);
    const char* from = table_ + step.tokens[row] * bytes;
    if (type_ == kElementFloat32) {
      std::memcpy(out_.row(row), from, bytes);
    } else {
      kernels_.widen(from, type_, out_.width(), out_.row(row));
    }
    float* const out = out_.row(row);
    for (int64_t i = 0; scale_ != 1.0f && i < out_.width(); ++i) out[i] *= scale_;
    out_.finish(row, 0, out_.width());
  });
}

void EmbedPacked::run(const StepInput& step, Team team, float*) {
  last_.work(team, [&](int64_t row) {
    float* const out = out_.row(row);
    table_.read(step.tokens[row], out);
    for (int64_t i = 0; scale_ != 1.0f && i < out_.width(); ++i) out[i] *= scale_;
    out_.finish(row, 0, out_.width());
  });
}

void Norm::run(const StepInput&, Team team, float* scratch) {
  last_.work(team, [&](int64_t row) {
    float* const out = out_.row(row);
    kernels_.rms_norm(x_.row(row), weight_.data(), x_.width(), eps_, onto_ ? scratch : out);
    for (int64_t i = 0; onto_ && i < out_.width(); ++i) out[i] = (out[i] + scratch[i]) * scale_;
    out_.finish(row, 0, out_.width());
  });
}

void Activate::run(const StepInput&, Team team, float*) {
  last_.work(team, [&](int64_t item) {
    const int64_t row = item / runs(), first = item % runs() * kColumns;
    const int64_t count = std::min(kColumns, out_.width() - first), whole = count / 16 * 16;
    const float *gate = gate_.row(row) + first, *up = up_.row(row) + first;
    float* out = out_.row(row) + first;
    kernels_.activate(how_, gate, up, out, static_cast<int>(whole / 16));
    if (whole < count) {
      float rest[3][16] = {};
      std::copy(gate + whole, gate + count, rest[0]);
      std::copy(up + whole, up + count, rest[1]);
      kernels_.activate(how_, rest[0], rest[1], rest[2], 1);
      std::copy_n(rest[2], count - whole, out + whole);
    }
    out_.finish(row, first, count);
  });
}

}  // namespace gemq
