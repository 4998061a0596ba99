// What one thread does when repacking, the same text on the CPU and on CUDA.
#pragma once

#include "gemq/layouts.h"
#include "pack/pack.h"

namespace gemq {

template <int BITS>
GEMQ_HD void load_stream(const uint8_t* at, uint32_t (&words)[BITS]) {
  GEMQ_UNROLL
  for (int i = 0; i < BITS; ++i) words[i] = load_word(at + 4 * i);
}

template <int BITS>
GEMQ_HD void store_stream(uint8_t* at, const uint32_t (&words)[BITS]) {
  GEMQ_UNROLL
  for (int i = 0; i < BITS; ++i) store_word(at + 4 * i, words[i]);
}

// 32 columns of one row, padding rows included.
template <int BITS>
GEMQ_HD void repack_to_cpu_tile(const RepackArgs& a, int64_t row, int64_t run) {
  uint32_t stream[BITS] = {}, tile[BITS];
  if (row < a.n) load_stream<BITS>(a.src_codes + (row * (a.k / 32) + run) * 4 * BITS, stream);
  cpu_tile_from_stream<BITS>(stream, tile);
  for_each_cpu_tile_word<BITS>(row, run, a.k, a.group_size,
                               [&](int i, int64_t at) { store_word(a.dst_codes + 4 * at, tile[i]); });
}

template <int BITS>
GEMQ_HD void repack_from_cpu_tile(const RepackArgs& a, int64_t row, int64_t run) {
  uint32_t stream[BITS], tile[BITS];
  for_each_cpu_tile_word<BITS>(row, run, a.k, a.group_size,
                               [&](int i, int64_t at) { tile[i] = load_word(a.src_codes + 4 * at); });
  stream_from_cpu_tile<BITS>(tile, stream);
  store_stream<BITS>(a.dst_codes + (row * (a.k / 32) + run) * 4 * BITS, stream);
}

// All words of (row, span, i): gathers one pair of columns for each field.
template <int BITS>
GEMQ_HD void repack_to_gpu_tile(const RepackArgs& a, const GpuShape& shape, int64_t row, int64_t span,
                                int i) {
  constexpr int kStored = gpu_bits(BITS), kFields = gpu_fields(kStored), kWords = gpu_words(kStored);
  uint32_t words[kWords] = {};
  const uint8_t* source = a.src_codes + row * (a.k / 32) * 4 * BITS;
  GEMQ_UNROLL
  for (int f = 0; f < kFields; ++f) {
    const int64_t c = span * shape.span + f * 2 * shape.kw + 2 * i;
    if (row < a.n && c < a.k) {  // k is even, so a pair is inside or outside as a whole
      const uint32_t pair = load_pair<BITS>(source, c);
      add_gpu_field<kStored>(words, f, pair & ((1u << BITS) - 1), pair >> BITS);
    }
  }
  GEMQ_UNROLL
  for (int w = 0; w < kWords; ++w) {
    store_word(a.dst_codes + gpu_word_index<kStored>(shape, row, span, w, i) * 4, words[w]);
  }
}

template <int BITS>
GEMQ_HD void repack_from_gpu_tile(const RepackArgs& a, const GpuShape& shape, int64_t row, int64_t run) {
  uint32_t stream[BITS] = {};
  GEMQ_UNROLL
  for (int c = 0; c < 32; c += 2) {
    const uint32_t pair = load_gpu_pair<gpu_bits(BITS)>(a.src_codes, shape, row, run * 32 + c);
    add_code<BITS>(stream, c, pair & ((1u << BITS) - 1));
    add_code<BITS>(stream, c + 1, (pair >> 16) & ((1u << BITS) - 1));
  }
  store_stream<BITS>(a.dst_codes + (row * (a.k / 32) + run) * 4 * BITS, stream);
}

GEMQ_HD void repack_meta(const RepackArgs& a, int64_t row, int64_t group) {
  const int64_t groups = a.k / a.group_size;
  const MetaAt from = meta_at(a.inverse ? a.layout : 0, row, group, groups);
  const MetaAt to = meta_at(a.inverse ? 0 : a.layout, row, group, groups);
  a.dst_meta[to.s] = row < a.n ? a.src_meta[from.s] : 0;
  a.dst_meta[to.m] = row < a.n ? a.src_meta[from.m] : 0;
}

// Rows written: the inverse writes the matrix's own, the other direction also the padding of the last block.
GEMQ_HD int64_t repack_rows(const RepackArgs& a) {
  const int block = a.layout == kCpuTile ? kCpuRows : kGpuRows;
  return a.inverse ? a.n : ceil_div(a.n, block) * block;
}

}  // namespace gemq
