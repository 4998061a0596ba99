// GPTQ's column loop on CUDA: the text of column_loop.h with a thread for each row.
#include "gptq/column_loop.h"
#include "gptq/group.h"
#include "gptq/row_threads.cuh"

namespace gemq {
namespace {

struct ThreadOps {
  using V = float;
  using I = int32_t;
  GEMQ_DEVICE_TOO static I bits(V value) { return static_cast<I>(float_bits(value)); }
  GEMQ_DEVICE_TOO static V from_bits(I value) { return bits_float(static_cast<uint32_t>(value)); }
  GEMQ_DEVICE_TOO static V to_float(I value) { return static_cast<V>(value); }
  GEMQ_DEVICE_TOO static V half(V value) { return half_to_float(float_to_half(value)); }
  GEMQ_DEVICE_TOO static bool any_below(V value, float limit) { return value < limit; }
  using PaperNorm = PowerNorm<ThreadOps>;
};

// Rows do not see each other.
__global__ void quantize_rows(GptqGroup a) {
  const int64_t at = row_of_thread(a), matrix = blockIdx.y;
  if (at < 0) return;
  const SharedColumns w = columns_of(a.block + at * a.group, a.group);
  const int bits = a.bits[matrix];
  const Grid<float> grid = find_grid<ThreadOps>(w, a.group, bits, a.clip);
  a.meta[2 * at] = float_to_half(grid.s);
  a.meta[2 * at + 1] = float_to_half(grid.m);
  quantize_columns<ThreadOps>(w, a.factor + matrix * a.group * a.group, a.group, bits,
                              bits >= a.propagate_from, grid, [&](int k, float code, float error) {
                                a.codes[at * a.group + k] = static_cast<uint8_t>(code);
                                a.errors[at * a.group + k] = error;
                              });
}

}  // namespace

void gptq_group_cuda(const GptqGroup& args, void* stream) {
  launch_rows(quantize_rows, args, stream, "gptq_group");
}

}  // namespace gemq
