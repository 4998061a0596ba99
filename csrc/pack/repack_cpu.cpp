#include "gemq/dispatch.h"
#include "gemq/huge_pages.h"
#include "gemq/parallel.h"
#include "pack/repack_rows.h"

namespace gemq {
namespace {

template <int BITS>
void repack_row(const RepackArgs& a, int64_t row) {
  const int64_t runs = a.k / 32;
  if (a.layout == kCpuTile) {
    for (int64_t run = 0; run < runs; ++run) {
      a.inverse ? repack_from_cpu_tile<BITS>(a, row, run) : repack_to_cpu_tile<BITS>(a, row, run);
    }
    return;
  }
  const GpuShape shape = gpu_shape(a.k, gpu_bits(BITS));
  if (a.inverse) {
    for (int64_t run = 0; run < runs; ++run) repack_from_gpu_tile<BITS>(a, shape, row, run);
    return;
  }
  for (int64_t span = 0; span < shape.spans; ++span) {
    for (int i = 0; i < shape.kw; ++i) repack_to_gpu_tile<BITS>(a, shape, row, span, i);
  }
}

}  // namespace

void repack_cpu(const RepackArgs& args, int threads) {
  const int64_t groups = args.k / args.group_size;
  if (args.layout == kCpuTile && !args.inverse) {
    advise_huge_pages(args.dst_codes, repack_rows(args) * args.k / 8 * args.bits);
  }
  parallel(threads, [&](Team team) {
    const Range rows = team.share(repack_rows(args));
    with_bits(args.bits, [&](auto bits) {
      for (int64_t row = rows.begin; row < rows.end; ++row) repack_row<bits()>(args, row);
    });
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      for (int64_t group = 0; group < groups; ++group) repack_meta(args, row, group);
    }
  });
}

}  // namespace gemq
