// Index maps of the kernels' layouts; python/gemq/format.py describes them.
#pragma once

#include "gemq/bit_swaps.h"
#include "gemq/bits.h"

namespace gemq {

enum Layout { kCpuTile = 1, kGpuTile = 2 };

// Rows of a block of cpu_tile and of a tile of gpu_tile; gemq/format.py and triton_kernels/layout.py say the
// same, and tests/test_build.py compares.
constexpr int kCpuRows = 16;
constexpr int kGpuRows = 64;
static_assert(kCpuRows * sizeof(uint32_t) == 64, "a word a row of a block is a vector of 64 bytes");
static_assert(kGpuRows >= 32 && (kGpuRows & (kGpuRows - 1)) == 0, "what the Triton kernels can read");

// Bits a weight, codes and (s, m): a pair of float16 a group of 128, 64 or 32 columns adds 0.25, 0.5 or 1.
//
//   width              1     2     3     4     5     6     7     8
//   plain, cpu_tile    1.25  2.25  3.25  4.25  5.25  6.25  7.25  8.25   groups of 128, rows of whole blocks
//   gpu_tile           1.25  2.25  3.25  4.25  8.25  8.25  8.25  8.25   and k of whole spans
//
//   plain      rows one after the other             row 0 [code 0 | code 1 | ...] row 1 [...]
//   cpu_tile   [block of 16 rows][group][plane of 4, 2 or 1 bits][vector of 64 bytes: 4 bytes a row]
//   gpu_tile   [tile of 64 rows][span][word block][row][kw words of two half-words: fields]
constexpr double meta_bits(int group_size) { return 2.0 * 16 / group_size; }
static_assert(meta_bits(128) == 0.25 && meta_bits(64) == 0.5 && meta_bits(32) == 1.0);

// ---- cpu_tile: 32 codes of a row are BITS words in either layout, only cut differently ----

// Calls f(width, first): a plane of `width` bits whose lowest is bit `first` of the code. `first` is also
// how many of the BITS tile words come before the plane's own.
template <int BITS, class F>
GEMQ_HD void for_each_cpu_plane(F&& f) {
  if constexpr (BITS == 8) {
    f(8, 0);
  } else {
    if constexpr ((BITS & 4) != 0) f(4, 0);
    if constexpr ((BITS & 2) != 0) f(2, BITS & 4);
    if constexpr ((BITS & 1) != 0) f(1, BITS & 6);
  }
}

// Bit of word c * width / 32 of a plane where the plane's part of code c sits.
GEMQ_HD int cpu_tile_shift(int c, int width) {
  const int inside = c % (32 / width);
  return 8 * (inside % 4) + width * (inside / 4);
}

// Of a plane that is the whole code, a word of the stream to the word of the tile: in digits of a bit's
// index, (column, bit of the code) to (column % 4, column / 4, bit of the code).
template <int BITS>
GEMQ_HD uint32_t cpu_tile_word(uint32_t stream) {
  if constexpr (BITS == 1) {
    return swap_digits<0, 1>(swap_digits<1, 2>(swap_digits<0, 3>(swap_digits<1, 4>(stream))));
  } else if constexpr (BITS == 2) {
    return swap_digits<1, 3>(swap_digits<2, 4>(stream));
  } else if constexpr (BITS == 4) {
    return swap_digits<2, 3>(swap_digits<3, 4>(stream));
  } else {
    return stream;
  }
}
template <int BITS>
GEMQ_HD uint32_t stream_word(uint32_t tile) {
  if constexpr (BITS == 1) {
    return swap_digits<1, 4>(swap_digits<0, 3>(swap_digits<1, 2>(swap_digits<0, 1>(tile))));
  } else if constexpr (BITS == 2) {
    return swap_digits<2, 4>(swap_digits<1, 3>(tile));
  } else if constexpr (BITS == 4) {
    return swap_digits<3, 4>(swap_digits<2, 3>(tile));
  } else {
    return tile;
  }
}

template <int BITS>
GEMQ_HD void cpu_tile_from_stream(const uint32_t (&stream)[BITS], uint32_t (&tile)[BITS]) {
  constexpr bool kOnePlane = (BITS & (BITS - 1)) == 0;
  GEMQ_UNROLL
  for (int i = 0; i < BITS; ++i) tile[i] = kOnePlane ? cpu_tile_word<BITS>(stream[i]) : 0;
  if constexpr (!kOnePlane) {
    GEMQ_UNROLL
    for (int c = 0; c < 32; ++c) {
      const uint32_t code = code_of<BITS>(stream, c);
      for_each_cpu_plane<BITS>([&](int width, int first) {
        tile[first + c * width / 32] |= ((code >> first) & ((1u << width) - 1)) << cpu_tile_shift(c, width);
      });
    }
  }
}

template <int BITS>
GEMQ_HD void stream_from_cpu_tile(const uint32_t (&tile)[BITS], uint32_t (&stream)[BITS]) {
  constexpr bool kOnePlane = (BITS & (BITS - 1)) == 0;
  GEMQ_UNROLL
  for (int i = 0; i < BITS; ++i) stream[i] = kOnePlane ? stream_word<BITS>(tile[i]) : 0;
  if constexpr (!kOnePlane) {
    GEMQ_UNROLL
    for (int c = 0; c < 32; ++c) {
      uint32_t code = 0;
      for_each_cpu_plane<BITS>([&](int width, int first) {
        code |= ((tile[first + c * width / 32] >> cpu_tile_shift(c, width)) & ((1u << width) - 1)) << first;
      });
      add_code<BITS>(stream, c, code);
    }
  }
}

// Where the tile words of columns [32 * run, 32 * run + 32) of `row` lie, in words; calls f(i, at) for each.
template <int BITS, class F>
GEMQ_HD void for_each_cpu_tile_word(int64_t row, int64_t run, int64_t k, int group_size, F&& f) {
  const int runs_log2 = group_log2(group_size) - 5;
  const int64_t group = run >> runs_log2;
  const int64_t column = (run & ((1 << runs_log2) - 1)) * 32;
  const int64_t base = (row / kCpuRows * (k >> (runs_log2 + 5)) + group) * (group_size / 2) * BITS;
  for_each_cpu_plane<BITS>([&](int width, int first) {
    const int64_t plane = base + group_size / 2 * first + column * width / 32 * kCpuRows + row % kCpuRows;
    GEMQ_UNROLL
    for (int i = 0; i < width; ++i) f(first + i, plane + static_cast<int64_t>(i) * kCpuRows);
  });
}

// ---- gpu_tile ----

GEMQ_DEVICE_TOO constexpr int gpu_bits(int bits) {
  return bits == 1 || bits == 2 || bits == 3 || bits == 4 ? bits : 8;
}
GEMQ_DEVICE_TOO constexpr int gpu_words(int bits) { return bits == 3 ? 3 : bits == 8 ? 2 : 1; }
GEMQ_DEVICE_TOO constexpr int gpu_fields(int bits) { return bits == 3 ? 16 : bits == 8 ? 4 : 16 / bits; }

// Words of both halves hold exactly the codes of a span: fields * 2 codes a word of each block.
constexpr bool gpu_words_are_full(int bits) { return 32 * gpu_words(bits) == 2 * gpu_fields(bits) * bits; }
static_assert(gpu_words_are_full(1) && gpu_words_are_full(2) && gpu_words_are_full(3) &&
              gpu_words_are_full(4) && gpu_words_are_full(8));

struct GpuShape {
  int kw;         // words along K of one row
  int64_t spans;  // spans of `span` columns
  int span;
};

// `stored` is the width of the tile, gpu_bits(bits): the padding is the smaller of two span sizes.
GEMQ_HD GpuShape gpu_shape(int64_t k, int stored) {
  const int wide = 32 * gpu_fields(stored), narrow = 16 * gpu_fields(stored);
  const bool use_narrow = ceil_div(k, narrow) * narrow < ceil_div(k, wide) * wide;
  const int span = use_narrow ? narrow : wide;
  return {use_narrow ? 8 : 16, ceil_div(k, span), span};
}

template <int STORED>
GEMQ_HD int64_t gpu_word_index(const GpuShape& shape, int64_t row, int64_t span, int word, int i) {
  const int64_t at = (row / kGpuRows * shape.spans + span) * gpu_words(STORED) + word;
  return (at * kGpuRows + row % kGpuRows) * shape.kw + i;
}

// Puts the codes of two neighbouring columns, in the low and the high half, at field f of words that start at
// 0.
template <int STORED>
GEMQ_HD void add_gpu_field(uint32_t (&words)[gpu_words(STORED)], int f, uint32_t low, uint32_t high) {
  const uint32_t both = low | high << 16;
  if constexpr (STORED == 3) {
    if (f == 15) {
      GEMQ_UNROLL
      for (int b = 0; b < 3; ++b) words[b] |= ((both >> b) & 0x00010001u) << 15;
    } else {
      words[f / 5] |= both << (3 * (f % 5));
    }
  } else {
    constexpr int kPerWord = 16 / STORED;
    words[f / kPerWord] |= both << (STORED * (f % kPerWord));
  }
}

// The inverse: field f as low | high << 16, where word(w) gives word w.
template <int STORED, class Word>
GEMQ_HD uint32_t gpu_field(int f, Word&& word) {
  if constexpr (STORED == 3) {
    if (f < 15) return (word(f / 5) >> (3 * (f % 5))) & 0x00070007u;
    uint32_t both = 0;
    GEMQ_UNROLL
    for (int b = 0; b < 3; ++b) both |= ((word(b) >> 15) & 0x00010001u) << b;
    return both;
  } else {
    constexpr int kPerWord = 16 / STORED;
    constexpr uint32_t kMask = ((1u << STORED) - 1) * 0x00010001u;
    return (word(f / kPerWord) >> (STORED * (f % kPerWord))) & kMask;
  }
}

// The same from memory: columns c and c + 1 (c even) of a row.
template <int STORED>
GEMQ_HD uint32_t load_gpu_pair(const uint8_t* tile, const GpuShape& shape, int64_t row, int64_t c) {
  const int64_t span = c / shape.span;
  const int inside = static_cast<int>(c % shape.span);
  const int f = inside / (2 * shape.kw), i = inside % (2 * shape.kw) / 2;
  return gpu_field<STORED>(
      f, [&](int w) { return load_word(tile + gpu_word_index<STORED>(shape, row, span, w, i) * 4); });
}

// A whole span of a row at 1, 2 or 4 bits with 16 words along k, at once. In digits of the index, from the
// top: stream words are (field, high part of i) and their bits (low part of i, half, bit of the code); tile
// words are i and their bits (half, field, bit of the code). Tile word i comes from
// words[gpu_span_word<BITS>(i)].
template <int BITS>
constexpr int kCodeDigits = BITS == 1   ? 0
                            : BITS == 2 ? 1
                                        : 2;

template <int BITS>
GEMQ_HD int gpu_span_word(int i) {
  constexpr int kFieldDigits = 4 - kCodeDigits<BITS>;
  return (i << kCodeDigits<BITS> & 15) | i >> kFieldDigits;
}

template <int BITS>
GEMQ_HD void gpu_tile_from_span(uint32_t (&words)[16]) {
  GEMQ_UNROLL
  for (int w = 0; w < 16; ++w) words[w] = lift_digit<kCodeDigits<BITS>>(words[w]);
  transpose_digits<kCodeDigits<BITS>>(words);
}

template <int BITS>
GEMQ_HD void span_from_gpu_tile(uint32_t (&words)[16]) {
  transpose_digits<kCodeDigits<BITS>>(words);
  GEMQ_UNROLL
  for (int w = 0; w < 16; ++w) words[w] = lower_digit<kCodeDigits<BITS>>(words[w]);
}

// ---- metadata, in float16 elements ----

// Where `s` and `m` of (row, group) lie in `layout`; 0 is canonical.
struct MetaAt {
  int64_t s, m;
};
GEMQ_HD MetaAt meta_at(int layout, int64_t row, int64_t group, int64_t groups) {
  if (layout == kCpuTile) {
    const int64_t at = (row / kCpuRows * groups + group) * 2 * kCpuRows + row % kCpuRows;
    return {at, at + kCpuRows};
  }
  const int64_t pair = layout == kGpuTile ? (row / kGpuRows * groups + group) * kGpuRows + row % kGpuRows
                                          : row * groups + group;
  return {2 * pair, 2 * pair + 1};
}

}  // namespace gemq
