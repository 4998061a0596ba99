#include "gptq/descent.h"

#include <algorithm>

#include "gemq/parallel.h"
#include "moe_cpu/kernels.h"

namespace gemq {

void descend_codes_cpu(const CodeDescent& a, int threads) {
  constexpr int kRows = 16;
  const Kernels& variant = kernels();
  const int64_t tiles = (a.n + kRows - 1) / kRows;
  parallel(threads, [&](const Team& team) {
    const Range jobs = team.share(a.matrices * tiles);
    for (int64_t job = jobs.begin; job < jobs.end; ++job) {
      const int64_t matrix = job / tiles, first = job % tiles * kRows, row = matrix * a.n + first;
      variant.descend_codes({a.products + row * a.group, a.hessian + matrix * a.group * a.group,
                             a.meta + row * 2, a.codes + row * a.group,
                             static_cast<int>(std::min<int64_t>(kRows, a.n - first)), a.group,
                             a.bits[matrix]});
    }
  });
}

}  // namespace gemq
