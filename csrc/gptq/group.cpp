#include "gptq/group.h"

#include <algorithm>

#include "gemq/parallel.h"
#include "moe_cpu/kernels.h"

namespace gemq {

void gptq_group(const float* block, const float* factor, const int32_t* bits, uint8_t* codes, uint16_t* meta,
                float* errors, int64_t matrices, int64_t n, int group, Clip clip, int propagate_from,
                int threads) {
  const Kernels& variant = kernels();
  const int64_t tiles = (n + 15) / 16;
  parallel(threads, [&](const Team& team) {
    const Range jobs = team.share(matrices * tiles);
    for (int64_t job = jobs.begin; job < jobs.end; ++job) {
      const int64_t matrix = job / tiles, first = job % tiles * 16, row = matrix * n + first;
      GptqRows args;
      args.block = block + row * group;
      args.factor = factor + matrix * group * group;
      args.rows = static_cast<int>(std::min<int64_t>(16, n - first));
      args.group = group;
      args.bits = bits[matrix];
      args.clip = clip;
      args.propagate = bits[matrix] >= propagate_from;
      args.codes = codes + row * group;
      args.meta = meta + row * 2;
      args.errors = errors + row * group;
      variant.gptq_rows(args);
    }
  });
}

}  // namespace gemq
