// Packing at the border to Python: addresses and sizes in, checked. Device 0 is the CPU, 1 is CUDA.
#pragma once

#include <cstdint>

#include "fields.h"

namespace gemq {

// Of pack and unpack.
struct PackCall {
  int device;
  uintptr_t src, dst;
  int64_t rows, k;
  int bits, threads = 1;
  uintptr_t stream = 0;
  static constexpr auto fields() {
    using C = PackCall;
    return std::make_tuple(field("device", &C::device), field("src", &C::src), field("dst", &C::dst),
                           field("rows", &C::rows), field("k", &C::k), field("bits", &C::bits),
                           optional_field("threads", &C::threads), optional_field("stream", &C::stream));
  }
};

struct DequantizeCall {
  int device;
  uintptr_t src, meta, dst;
  int64_t rows, k;
  int bits, group_size, out_dtype, threads = 1;
  uintptr_t stream = 0;
  static constexpr auto fields() {
    using C = DequantizeCall;
    return std::make_tuple(field("device", &C::device), field("src", &C::src), field("meta", &C::meta),
                           field("dst", &C::dst), field("rows", &C::rows), field("k", &C::k),
                           field("bits", &C::bits), field("group_size", &C::group_size),
                           field("out_dtype", &C::out_dtype), optional_field("threads", &C::threads),
                           optional_field("stream", &C::stream));
  }
};

// Layout 1 is cpu_tile, 2 gpu_tile; inverse: from it.
struct RepackCall {
  int device;
  uintptr_t src_codes, src_meta, dst_codes, dst_meta;
  int64_t n, k;
  int bits, group_size, layout;
  bool inverse = false;
  int threads = 1;
  uintptr_t stream = 0;
  static constexpr auto fields() {
    using C = RepackCall;
    return std::make_tuple(field("device", &C::device), field("src_codes", &C::src_codes),
                           field("src_meta", &C::src_meta), field("dst_codes", &C::dst_codes),
                           field("dst_meta", &C::dst_meta), field("n", &C::n), field("k", &C::k),
                           field("bits", &C::bits), field("group_size", &C::group_size),
                           field("layout", &C::layout), optional_field("inverse", &C::inverse),
                           optional_field("threads", &C::threads), optional_field("stream", &C::stream));
  }
};

// Rows of a matrix in cpu_tile, or canonical, as float32; on the CPU.
struct RowsCall {
  uintptr_t codes, meta, rows, dst;
  int64_t n, count, k;
  int bits, group_size;
  bool tiled;
  int threads = 1;
  static constexpr auto fields() {
    using C = RowsCall;
    return std::make_tuple(field("codes", &C::codes), field("meta", &C::meta), field("rows", &C::rows),
                           field("dst", &C::dst), field("n", &C::n), field("count", &C::count),
                           field("k", &C::k), field("bits", &C::bits), field("group_size", &C::group_size),
                           field("tiled", &C::tiled), optional_field("threads", &C::threads));
  }
};

void bind_pack(const PackCall& c);
void bind_unpack(const PackCall& c);
void bind_dequantize(const DequantizeCall& c);
void bind_repack(const RepackCall& c);
void bind_read_rows(const RowsCall& c);

}  // namespace gemq
