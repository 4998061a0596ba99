#include "gptq/descent.h"

#include "gptq/row_tiles.h"
#include "moe_cpu/kernels.h"

namespace gemq {

void descend_codes_cpu(const CodeDescent& a, int threads) {
  const Kernels& variant = kernels();
  over_row_tiles(a.matrices, a.n, threads, [&](int64_t matrix, int64_t row, int rows) {
    variant.descend_codes({a.products + row * a.group, a.hessian + matrix * a.group * a.group,
                           a.meta + row * 2, a.codes + row * a.group, rows, a.group, a.bits[matrix]});
  });
}

}  // namespace gemq
