#include "decode/linear.h"

#include <algorithm>

#include "decode/scalars.h"
#include "gemq/bits.h"
#include "moe_cpu/projection.h"

namespace gemq {
namespace {

// Items a thread: enough to even out a thread that is slower.
constexpr int kItems = 4;
// Bytes asked for ahead of an operation, as many as its products ask for ahead of themselves.
constexpr int kFirstBytes = 6144;

}  // namespace

Linear::Linear(const Kernels& kernels, Rows& x, std::vector<Matrix> matrices, bool onto, const Rows* gate)
    : kernels_(kernels), x_(x), matrices_(std::move(matrices)), onto_(onto), gate_(gate) {
  for (const Matrix& matrix : matrices_) {
    if (matrix.bits > 0) x_.packed(matrix.group_size);
  }
  for (int64_t i = 0; i < x_.count(); ++i) index_.push_back(static_cast<int32_t>(i));
}

int64_t Linear::scratch_floats() const { return static_cast<int64_t>(x_.count()) * kManyBlocks * kBlockRows; }

int64_t Linear::block_bytes(const Matrix& matrix) const {
  return matrix.bits > 0 ? 2 * matrix.bits * x_.width()
                         : kBlockRows * element_bytes(matrix.type) * x_.width();
}

const char* Linear::start(const Item& item) const {
  return static_cast<const char*>(item.matrix->weights) + item.block * block_bytes(*item.matrix);
}

void Linear::reset(const StepInput&, int threads) {
  if (threads != threads_) {
    threads_ = threads;
    int64_t all = 0;
    for (const Matrix& matrix : matrices_) all += ceil_div(matrix.n, kBlockRows);
    const int64_t step = std::clamp<int64_t>(all / (kItems * threads), 1, kManyBlocks);
    items_.clear();
    for (const Matrix& matrix : matrices_) {
      const int64_t blocks = ceil_div(matrix.n, kBlockRows);
      for (int64_t at = 0; at < blocks; at += step) {
        items_.push_back({&matrix, at, static_cast<int>(std::min(step, blocks - at))});
      }
    }
  }
  last_.reset(static_cast<int64_t>(items_.size()), threads);
}

void Linear::fetch(Team team) const {
  const Range share = team.share(static_cast<int64_t>(items_.size()));
  if (share.begin >= share.end) return;
  const Item& item = items_[share.begin];
  const char* at = start(item);
  const int64_t bytes = std::min<int64_t>(kFirstBytes, item.blocks * block_bytes(*item.matrix));
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 3);
}

void Linear::run(const StepInput&, Team team, float* scratch) {
  last_.work(team, [&](int64_t i) {
    product(items_[i], scratch);
    put(items_[i], scratch);
  });
}

void Linear::product(const Item& item, float* tile) const {
  const Matrix& m = *item.matrix;
  const int k = static_cast<int>(x_.width()), count = static_cast<int>(x_.count());
  if (m.bits == 0) {
    const auto rows =
        static_cast<int>(std::min<int64_t>(item.blocks * kBlockRows, m.n - item.block * kBlockRows));
    return kernels_.dense_product({start(item), m.type, rows, k, x_.row(0), x_.stride(), count}, tile);
  }
  const Activations& x = x_.packed(m.group_size);
  const int64_t halves = static_cast<int64_t>(x.groups()) * 2 * kBlockRows;
  const int step = blocks_at_once(count);
  for (int done = 0; done < item.blocks; done += step) {
    const BlockArgs args{reinterpret_cast<const uint8_t*>(start(item)) + done * block_bytes(m),
                         m.meta + (item.block + done) * halves,
                         m.bits,
                         k,
                         m.group_size,
                         std::min(step, item.blocks - done),
                         x.view(index_.data(), count)};
    float* to = tile + static_cast<int64_t>(done) * count * kBlockRows;
    x.integers() ? kernels_.integer_product(args, to) : kernels_.exact_product(args, to);
  }
}

void Linear::put(const Item& item, const float* tile) const {
  const Matrix& m = *item.matrix;
  for (int64_t t = 0; t < x_.count(); ++t) {
    const float factor = gate_ == nullptr ? 1.0f : sigmoid(gate_->row(t)[0]);
    for (int b = 0; b < item.blocks; ++b) {
      const int64_t first = (item.block + b) * kBlockRows;
      const int width = static_cast<int>(std::min<int64_t>(kBlockRows, m.n - first));
      const float* from = tile + (b * x_.count() + t) * kBlockRows;
      float* to = m.out->row(t) + first;
      for (int i = 0; i < width; ++i) {
        const float value = m.bias.empty() ? from[i] : from[i] + m.bias[first + i];
        to[i] = onto_ ? to[i] + factor * value : value;
      }
    }
  }
}

}  // namespace gemq
