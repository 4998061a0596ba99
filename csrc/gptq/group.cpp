#include "gptq/group.h"

#include "gptq/row_tiles.h"
#include "moe_cpu/kernels.h"

namespace gemq {

void gptq_group_cpu(const GptqGroup& a, int threads) {
  const Kernels& variant = kernels();
  over_row_tiles(a.matrices, a.n, threads, [&](int64_t matrix, int64_t row, int rows) {
    variant.gptq_rows({a.block + row * a.group, a.factor + matrix * a.group * a.group, rows, a.group,
                       a.bits[matrix], a.clip, a.bits[matrix] >= a.propagate_from, a.codes + row * a.group,
                       a.meta + row * 2, a.errors + row * a.group});
  });
}

}  // namespace gemq
