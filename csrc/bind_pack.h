#pragma once

#include <cstdint>

namespace gemq {

void bind_pack(int device, uintptr_t src, uintptr_t dst, int64_t rows, int64_t k, int bits, int threads,
               uintptr_t stream);
void bind_unpack(int device, uintptr_t src, uintptr_t dst, int64_t rows, int64_t k, int bits, int threads,
                 uintptr_t stream);
void bind_dequantize(int device, uintptr_t src, uintptr_t meta, uintptr_t dst, int64_t rows, int64_t k,
                     int bits, int group_size, int out_dtype, int threads, uintptr_t stream);
void bind_repack(int device, uintptr_t src_codes, uintptr_t src_meta, uintptr_t dst_codes, uintptr_t dst_meta,
                 int64_t n, int64_t k, int bits, int group_size, int layout, bool inverse, int threads,
                 uintptr_t stream);

}  // namespace gemq
