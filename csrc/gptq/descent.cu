// Descent over codes on CUDA: the text of column_loop.h with a thread for each row.
#include "gptq/column_loop.h"
#include "gptq/descent.h"
#include "gptq/row_threads.cuh"

namespace gemq {
namespace {

// Rows do not see each other.
__global__ void descend_rows(CodeDescent a) {
  const int64_t at = row_of_thread(a), matrix = blockIdx.y;
  if (at < 0) return;
  const SharedColumns products = columns_of(a.products + at * a.group, a.group);
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
