// Repacking as kernel bodies: a block stages a piece of the matrix in shared memory and permutes it there
// with the text of layouts.h, so that both sides of global memory see runs of 16-byte accesses.
#pragma once

#include "pack/repack_pieces.h"

namespace gemq {

template <int BITS>
struct CpuTilePieces {
  static constexpr int kColumns = BITS <= 2 ? 1024 : 512;
  static constexpr int kTileWords = kCpuRows * kColumns / 32 * BITS;
  static_assert(kColumns % 128 == 0, "a piece is whole groups of every size");
  using Tile = TilePiece<kTileWords, 4, 4>;
  struct Shared {
    CanonicalPiece<BITS, kCpuRows, kColumns> canonical;
    alignas(16) uint32_t tile[kTileWords];
  };

  // f(stream words, row, run) for this thread's share of the piece; neighbouring threads take neighbouring
  // rows, as the tile does.
  template <class F>
  GEMQ_DEVICE_TOO static void for_each_run(Shared& shared, int thread, F&& f) {
    for (int item = thread; item < kCpuRows * kColumns / 32; item += kThreads) {
      const int row = item % kCpuRows, run = item / kCpuRows;
      f(shared.canonical.row(row) + run * BITS, row, run);
    }
  }

  // Where the piece begins in the tile, in words, and how many words of it the matrix has.
  GEMQ_DEVICE_TOO static int64_t first_word(const RepackArgs& a, int64_t rows, int64_t chunk) {
    return (rows * a.k + chunk * kColumns) / 32 * kCpuRows * BITS;
  }
  GEMQ_DEVICE_TOO static int words(const RepackArgs& a, int64_t chunk) {
    return clipped(a.k - chunk * kColumns, kColumns) / 32 * kCpuRows * BITS;
  }
};

template <int BITS>
struct ToCpuTile : CpuTilePieces<BITS> {
  using Args = RepackTileArgs;
  using Pieces = CpuTilePieces<BITS>;
  using Shared = typename Pieces::Shared;
  static constexpr int kPhases = 3;

  template <int PHASE>
  GEMQ_DEVICE_TOO static void run(const Args& a, int64_t block, int thread, Shared& shared) {
    const int64_t rows = block / a.chunks, chunk = block - rows * a.chunks;
    if constexpr (PHASE == 0) {
      shared.canonical.load(a, rows * kCpuRows, chunk, thread);
    } else if constexpr (PHASE == 1) {
      Pieces::for_each_run(shared, thread, [&](const uint32_t* at, int row, int piece_run) {
        uint32_t stream[BITS], tile[BITS];
        GEMQ_UNROLL
        for (int i = 0; i < BITS; ++i) stream[i] = at[i];
        cpu_tile_from_stream<BITS>(stream, tile);
        for_each_cpu_tile_word<BITS>(row, piece_run, Pieces::kColumns, a.matrix.group_size,
                                     [&](int i, int64_t word) { shared.tile[word] = tile[i]; });
      });
    } else {
      uint8_t* dst = a.matrix.dst_codes + Pieces::first_word(a.matrix, rows, chunk) * 4;
      Pieces::Tile::store(shared.tile, dst, Pieces::words(a.matrix, chunk), a.vectors, thread);
    }
  }
};

template <int BITS>
struct FromCpuTile {
  using Args = RepackTileArgs;
  using Pieces = CpuTilePieces<BITS>;
  using Shared = typename Pieces::Shared;
  static constexpr int kPhases = 3;

  template <int PHASE>
  GEMQ_DEVICE_TOO static void run(const Args& a, int64_t block, int thread, Shared& shared) {
    const int64_t rows = block / a.chunks, chunk = block - rows * a.chunks;
    if constexpr (PHASE == 0) {
      const uint8_t* src = a.matrix.src_codes + Pieces::first_word(a.matrix, rows, chunk) * 4;
      Pieces::Tile::load(shared.tile, src, Pieces::words(a.matrix, chunk), a.vectors, thread);
    } else if constexpr (PHASE == 1) {
      Pieces::for_each_run(shared, thread, [&](uint32_t* at, int row, int piece_run) {
        uint32_t stream[BITS], tile[BITS];
        for_each_cpu_tile_word<BITS>(row, piece_run, Pieces::kColumns, a.matrix.group_size,
                                     [&](int i, int64_t word) { tile[i] = shared.tile[word]; });
        stream_from_cpu_tile<BITS>(tile, stream);
        GEMQ_UNROLL
        for (int i = 0; i < BITS; ++i) at[i] = stream[i];
      });
    } else {
      shared.canonical.store(a, rows * kCpuRows, chunk, thread);
    }
  }
};

template <int BITS>
struct GpuTilePieces {
  static constexpr int kStored = gpu_bits(BITS), kFields = gpu_fields(kStored);
  static constexpr int kColumns = BITS == 1 ? 1024 : BITS <= 3 ? 512 : BITS == 4 ? 256 : 128;
  // the same for both numbers of words along k; a span never crosses a piece
  static constexpr int kTileWords = kColumns / (2 * kFields) * gpu_words(kStored) * kGpuRows;
  static constexpr bool kPowerOfTwo = BITS == 1 || BITS == 2 || BITS == 4;
  // lines of KW words, a pitch of an odd number of vectors apart
  static constexpr int kPitch16 = 20, kPitch8 = 12;
  static_assert(kColumns % (32 * kFields) == 0, "a span of either number of words ends with a piece");
  static_assert(kPitch16 >= 16 && kPitch16 / 4 % 2 == 1 && kPitch8 >= 8 && kPitch8 / 4 % 2 == 1);
  struct Shared {
    CanonicalPiece<BITS, kGpuRows, kColumns> canonical;
    alignas(16) uint32_t tile[kTileWords / 8 * kPitch8];
  };

  // f(std::integral_constant<int, words along k>), pitch likewise
  template <class F>
  GEMQ_DEVICE_TOO static void with_kw(const GpuShape& shape, F&& f) {
    if (shape.kw == 16) {
      f(std::integral_constant<int, 16>(), std::integral_constant<int, kPitch16>());
    } else {
      f(std::integral_constant<int, 8>(), std::integral_constant<int, kPitch8>());
    }
  }

  GEMQ_DEVICE_TOO static int64_t first_word(const RepackTileArgs& a, int64_t rows, int64_t chunk) {
    const int64_t span_words = gpu_words(kStored) * kGpuRows * a.shape.kw;
    return (rows * a.shape.spans + chunk * (kColumns / a.shape.span)) * span_words;
  }
  GEMQ_DEVICE_TOO static int words(const RepackTileArgs& a, int64_t chunk) {
    const int spans = kColumns / a.shape.span;
    return clipped(a.shape.spans - chunk * spans, spans) * gpu_words(kStored) * kGpuRows * a.shape.kw;
  }
};

template <int BITS>
struct ToGpuTile {
  using Args = RepackTileArgs;
  using Pieces = GpuTilePieces<BITS>;
  using Shared = typename Pieces::Shared;
  static constexpr int kPhases = 3;

  template <int PHASE>
  GEMQ_DEVICE_TOO static void run(const Args& a, int64_t block, int thread, Shared& shared) {
    const int64_t rows = block / a.chunks, chunk = block - rows * a.chunks;
    if constexpr (PHASE == 0) {
      shared.canonical.load(a, rows * kGpuRows, chunk, thread);
    } else {
      Pieces::with_kw(a.shape, [&](auto kw, auto pitch) {
        if constexpr (PHASE == 1) {
          if constexpr (kw() == 16 && Pieces::kPowerOfTwo) {
            permute_spans(thread, shared);
          } else {
            permute<kw(), pitch()>(thread, shared);
          }
        } else {
          uint8_t* dst = a.matrix.dst_codes + Pieces::first_word(a, rows, chunk) * 4;
          TilePiece<Pieces::kTileWords, kw(), pitch()>::store(shared.tile, dst, Pieces::words(a, chunk),
                                                              a.vectors, thread);
        }
      });
    }
  }

  // A span of a row a thread: 16 words to 16 words.
  GEMQ_DEVICE_TOO static void permute_spans(int thread, Shared& shared) {
    for (int item = thread; item < Pieces::kTileWords / 16; item += kThreads) {
      const int row = item % kGpuRows, span = item / kGpuRows;
      uint32_t words[16];
      load_vectors(shared.canonical.row(row) + span * 16, words);
      gpu_tile_from_span<BITS>(words);
      uint32_t tile[16];
      GEMQ_UNROLL
      for (int i = 0; i < 16; ++i) tile[i] = words[gpu_span_word<BITS>(i)];
      store_vectors(shared.tile + item * Pieces::kPitch16, tile);
    }
  }

  // Neighbouring threads take neighbouring words of the tile.
  template <int KW, int PITCH>
  GEMQ_DEVICE_TOO static void permute(int thread, Shared& shared) {
    constexpr int kWords = gpu_words(Pieces::kStored), kSpan = 2 * KW * Pieces::kFields;
    for (int item = thread; item < Pieces::kColumns / kSpan * kGpuRows * KW; item += kThreads) {
      const int i = item % KW, row = item / KW % kGpuRows, span = item / (KW * kGpuRows);
      const uint32_t* source = shared.canonical.row(row);
      uint32_t words[kWords] = {};
      GEMQ_UNROLL
      for (int f = 0; f < Pieces::kFields; ++f) {
        const uint32_t pair = bit_window<2 * BITS>(source, (span * kSpan + f * 2 * KW + 2 * i) * BITS);
        add_gpu_field<Pieces::kStored>(words, f, pair & ((1u << BITS) - 1),
                                       (pair >> BITS) & ((1u << BITS) - 1));
      }
      GEMQ_UNROLL
      for (int w = 0; w < kWords; ++w)
        shared.tile[((span * kWords + w) * kGpuRows + row) * PITCH + i] = words[w];
    }
  }
};

template <int BITS>
struct FromGpuTile {
  using Args = RepackTileArgs;
  using Pieces = GpuTilePieces<BITS>;
  using Shared = typename Pieces::Shared;
  static constexpr int kPhases = 3;

  template <int PHASE>
  GEMQ_DEVICE_TOO static void run(const Args& a, int64_t block, int thread, Shared& shared) {
    const int64_t rows = block / a.chunks, chunk = block - rows * a.chunks;
    if constexpr (PHASE == 2) {
      shared.canonical.store(a, rows * kGpuRows, chunk, thread);
    } else {
      Pieces::with_kw(a.shape, [&](auto kw, auto pitch) {
        if constexpr (PHASE == 0) {
          const uint8_t* src = a.matrix.src_codes + Pieces::first_word(a, rows, chunk) * 4;
          TilePiece<Pieces::kTileWords, kw(), pitch()>::load(shared.tile, src, Pieces::words(a, chunk),
                                                             a.vectors, thread);
        } else {
          if constexpr (kw() == 16 && Pieces::kPowerOfTwo) {
            permute_spans(thread, shared);
          } else {
            permute<kw(), pitch()>(thread, shared);
          }
        }
      });
    }
  }

  GEMQ_DEVICE_TOO static void permute_spans(int thread, Shared& shared) {
    for (int item = thread; item < Pieces::kTileWords / 16; item += kThreads) {
      const int row = item % kGpuRows, span = item / kGpuRows;
      uint32_t tile[16], words[16];
      load_vectors(shared.tile + item * Pieces::kPitch16, tile);
      GEMQ_UNROLL
      for (int i = 0; i < 16; ++i) words[gpu_span_word<BITS>(i)] = tile[i];
      span_from_gpu_tile<BITS>(words);
      store_vectors(shared.canonical.row(row) + span * 16, words);
    }
  }

  // 32 columns of a row a thread: one field of 16 words, or two of 8. Threads of a warp take neighbouring
  // rows of the same field, so that none waits for another's field.
  template <int KW, int PITCH>
  GEMQ_DEVICE_TOO static void permute(int thread, Shared& shared) {
    constexpr int kStored = Pieces::kStored, kWords = gpu_words(kStored);
    for (int item = thread; item < Pieces::kColumns / 32 * kGpuRows; item += kThreads) {
      const int row = item % kGpuRows, run = item / kGpuRows;
      uint32_t stream[BITS] = {};
      GEMQ_UNROLL
      for (int part = 0; part < 16 / KW; ++part) {
        const int field = run * (16 / KW) + part, span = field / Pieces::kFields;
        const uint32_t* line = shared.tile + (span * kWords * kGpuRows + row) * PITCH;
        GEMQ_UNROLL
        for (int i = 0; i < KW; i += 4) {
          const auto four = gpu_field_of_vectors<kStored>(
              field % Pieces::kFields, [&](int w) { return load_vector(line + w * kGpuRows * PITCH + i); });
          GEMQ_UNROLL
          for (int j = 0; j < 4; ++j) {
            const int c = 2 * (part * KW + i + j);
            add_code<BITS>(stream, c, four.words[j] & ((1u << BITS) - 1));
            add_code<BITS>(stream, c + 1, (four.words[j] >> 16) & ((1u << BITS) - 1));
          }
        }
      }
      GEMQ_UNROLL
      for (int i = 0; i < BITS; ++i) shared.canonical.row(row)[run * BITS + i] = stream[i];
    }
  }

  // gpu_field of four neighbouring words.
  template <int STORED, class Load>
  GEMQ_DEVICE_TOO static Vector gpu_field_of_vectors(int f, Load&& load) {
    const bool spread = STORED == 3 && f == 15;  // one bit of each word
    Vector held[gpu_words(STORED)] = {}, fields;
    held[0] = load(spread ? 0 : f / (STORED == 3 ? 5 : 16 / STORED));
    if constexpr (STORED == 3) {
      if (spread) held[1] = load(1), held[2] = load(2);
    }
    GEMQ_UNROLL
    for (int j = 0; j < 4; ++j) {
      fields.words[j] = spread ? gpu_field<STORED>(15, [&](int w) { return held[w].words[j]; })
                               : gpu_field<STORED>(f, [&](int) { return held[0].words[j]; });
    }
    return fields;
  }
};

}  // namespace gemq
