// Descent over codes on CUDA: the text of column_loop.h with a thread for each row.
#include "gptq/column_loop.h"
#include "gptq/descent.h"
#include "gptq/row_threads.cuh"

namespace gemq {
namespace {

// blockIdx.y is the matrix; rows do not see each other.
__global__ void descend_rows(CodeDescent a) {
  extern __shared__ float memory[];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x, matrix = blockIdx.y;
  if (row >= a.n) return;
  const int64_t at = matrix * a.n + row;
  const SharedColumns products{memory + threadIdx.x};
  for (int k = 0; k < a.group; ++k) products(k) = a.products[at * a.group + k];
  uint8_t* codes = a.codes + at * a.group;
  descend_columns(
      products, a.hessian + matrix * a.group * a.group, a.group, a.bits[matrix],
      half_to_float(a.meta[2 * at]), [&](int k) { return static_cast<float>(codes[k]); },
      [&](int k, float chosen) { codes[k] = static_cast<uint8_t>(chosen); });
}

}  // namespace

void descend_codes_cuda(const CodeDescent& args, void* stream) {
  launch_rows(descend_rows, args, stream, "descend_codes");
}

}  // namespace gemq
