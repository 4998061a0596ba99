// GPTQ's column loop on CUDA: the text of column_loop.h with a thread for each row.
#include "gptq/column_loop.h"
#include "gptq/group.h"
#include "pack/launch.h"

namespace gemq {
namespace {

constexpr int kRowThreads = 64;

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

// Column k of this thread's row: neighbours in a warp are neighbours in shared memory.
struct SharedColumns {
  float* at;
  __device__ float& operator()(int k) const { return at[k * kRowThreads]; }
};

// blockIdx.y is the matrix; rows do not see each other.
__global__ void quantize_rows(GptqGroup a) {
  extern __shared__ float memory[];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x, matrix = blockIdx.y;
  if (row >= a.n) return;
  const int64_t at = matrix * a.n + row;
  const SharedColumns w{memory + threadIdx.x};
  for (int k = 0; k < a.group; ++k) w(k) = a.block[at * a.group + k];
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
  constexpr int64_t kMostMatrices = 65535, kMostBlocks = 0x7fffffff;
  const int64_t blocks = ceil_div(args.n, kRowThreads);
  if (args.matrices > kMostMatrices || blocks > kMostBlocks) {
    throw std::runtime_error("gptq_group: too many matrices or rows for one launch");
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(args.matrices));
  const size_t shared = sizeof(float) * kRowThreads * args.group;
  quantize_rows<<<grid, kRowThreads, shared, static_cast<cudaStream_t>(stream)>>>(args);
  check_cuda(cudaGetLastError(), "gptq_group");
}

}  // namespace gemq
