#include "decode/row_operations.h"

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
    out_.finish(row, 0, out_.width());
  });
}

void Norm::run(const StepInput&, Team team, float*) {
  last_.work(team, [&](int64_t row) {
    kernels_.rms_norm(x_.row(row), weight_.data(), x_.width(), eps_, out_.row(row));
    out_.finish(row, 0, out_.width());
  });
}

void SiluMul::run(const StepInput&, Team team, float*) {
  last_.work(team, [&](int64_t item) {
    const int64_t row = item / runs(), first = item % runs() * kColumns;
    const int64_t count = std::min(kColumns, out_.width() - first);
    // rows are padded to whole blocks
    const auto blocks = static_cast<int>((count + 15) / 16);
    kernels_.silu_mul(gate_.row(row) + first, up_.row(row) + first, out_.row(row) + first, blocks);
    out_.finish(row, first, count);
  });
}

}  // namespace gemq
