#include "gemq/dispatch.h"
#include "pack/launch.h"
#include "pack/repack_rows.h"

namespace gemq {
namespace {

// Sixteen rows of one run are neighbours, the order of the tile: a half-warp writes 64 contiguous bytes.
template <int BITS>
__global__ void to_cpu_tile(RepackArgs a, int64_t rows) {
  const int64_t index = thread_index(), runs = a.k / 32;
  const int64_t row = index / (runs * kCpuRows) * kCpuRows + index % kCpuRows;
  if (row < rows) repack_to_cpu_tile<BITS>(a, row, index / kCpuRows % runs);
}

template <int BITS>
__global__ void from_cpu_tile(RepackArgs a, int64_t rows) {
  const int64_t index = thread_index(), runs = a.k / 32;
  const int64_t row = index / (runs * kCpuRows) * kCpuRows + index % kCpuRows;
  if (row < rows) repack_from_cpu_tile<BITS>(a, row, index / kCpuRows % runs);
}

// Neighbouring threads take neighbouring words of the tile: i, then the row, then the span.
template <int BITS>
__global__ void to_gpu_tile(RepackArgs a, int64_t rows, GpuShape shape) {
  const int64_t index = thread_index(), line = index / shape.kw, slab = line / kGpuRows;
  const int64_t row = slab / shape.spans * kGpuRows + line % kGpuRows;
  if (row < rows)
    repack_to_gpu_tile<BITS>(a, shape, row, slab % shape.spans, static_cast<int>(index % shape.kw));
}

template <int BITS>
__global__ void from_gpu_tile(RepackArgs a, int64_t rows, GpuShape shape) {
  const int64_t runs = a.k / 32, row = thread_index() / runs;
  if (row < rows) repack_from_gpu_tile<BITS>(a, shape, row, thread_index() % runs);
}

__global__ void repack_meta_kernel(RepackArgs a, int64_t rows, int64_t groups) {
  const int64_t row = thread_index() / groups;
  if (row < rows) repack_meta(a, row, thread_index() % groups);
}

template <int BITS>
void launch_codes(const RepackArgs& a, int64_t rows, void* stream) {
  const int64_t runs = a.k / 32;
  const int64_t cpu_threads = ceil_div(rows, kCpuRows) * kCpuRows * runs;
  const GpuShape shape = gpu_shape(a.k, gpu_bits(BITS));
  if (a.layout == kCpuTile && !a.inverse) {
    launch("repack to cpu_tile", to_cpu_tile<BITS>, cpu_threads, stream, a, rows);
  } else if (a.layout == kCpuTile) {
    launch("repack from cpu_tile", from_cpu_tile<BITS>, cpu_threads, stream, a, rows);
  } else if (!a.inverse) {
    launch("repack to gpu_tile", to_gpu_tile<BITS>, rows * shape.spans * shape.kw, stream, a, rows, shape);
  } else {
    launch("repack from gpu_tile", from_gpu_tile<BITS>, rows * runs, stream, a, rows, shape);
  }
}

}  // namespace

void repack_cuda(const RepackArgs& args, void* stream) {
  const int64_t rows = repack_rows(args), groups = args.k / args.group_size;
  with_bits(args.bits, [&](auto bits) { launch_codes<bits()>(args, rows, stream); });
  launch("repack metadata", repack_meta_kernel, rows * groups, stream, args, rows, groups);
}

}  // namespace gemq
