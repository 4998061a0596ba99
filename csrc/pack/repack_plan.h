// Which bodies serve a repack: run(Body(), args, blocks) for the codes and for the metadata.
#pragma once

#include "pack/repack_body.h"
#include "pack/repack_meta_body.h"

namespace gemq {

template <int BITS, class Run>
void plan_repack_codes(const RepackArgs& a, Run&& run) {
  const bool cpu = a.layout == kCpuTile;
  const int block_rows = cpu ? kCpuRows : kGpuRows;
  const int columns = cpu ? CpuTilePieces<BITS>::kColumns : GpuTilePieces<BITS>::kColumns;
  RepackTileArgs args{a, gpu_shape(a.k, gpu_bits(BITS)), ceil_div(a.k, columns), false};
  args.vectors = a.k / 32 * BITS % 4 == 0 && aligned_to(kVector, a.src_codes, a.dst_codes);
  const int64_t blocks = ceil_div(a.n, block_rows) * args.chunks;
  if (cpu && !a.inverse) run(ToCpuTile<BITS>(), args, blocks);
  if (cpu && a.inverse) run(FromCpuTile<BITS>(), args, blocks);
  if (!cpu && !a.inverse) run(ToGpuTile<BITS>(), args, blocks);
  if (!cpu && a.inverse) run(FromGpuTile<BITS>(), args, blocks);
}

template <int LAYOUT, bool INVERSE, class Run>
void plan_repack_meta_of(const RepackArgs& a, Run&& run) {
  using Body = RepackMeta<LAYOUT, INVERSE>;
  const int64_t groups = a.k / a.group_size;
  RepackMetaArgs args{a, ceil_div(groups, Body::kGroups)};
  if (aligned_to(kVector, a.src_meta, a.dst_meta)) {
    run(Body(), args, ceil_div(a.n, Body::kRows) * args.chunks);
  } else {
    run(RepackMetaAny(), args, ceil_div(repack_rows(a) * groups, kThreads));
  }
}

template <class Run>
void plan_repack_meta(const RepackArgs& a, Run&& run) {
  if (a.layout == kCpuTile) {
    a.inverse ? plan_repack_meta_of<kCpuTile, true>(a, run) : plan_repack_meta_of<kCpuTile, false>(a, run);
  } else {
    a.inverse ? plan_repack_meta_of<kGpuTile, true>(a, run) : plan_repack_meta_of<kGpuTile, false>(a, run);
  }
}

}  // namespace gemq
