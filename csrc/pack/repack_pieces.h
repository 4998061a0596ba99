// What a repacking block holds in shared memory: a piece of the canonical rows, and the piece of the tile
// that the same codes make.
#pragma once

#include "gemq/layouts.h"
#include "pack/pack.h"
#include "pack/vectors.h"

namespace gemq {

struct RepackTileArgs {
  RepackArgs matrix;
  GpuShape shape;  // of gpu_tile
  int64_t chunks;  // pieces along k of one block of rows
  bool vectors;    // canonical rows and all buffers by 16-byte accesses, else by words
};

GEMQ_HD int clipped(int64_t left, int most) { return left < most ? static_cast<int>(left) : most; }

// ROWS rows of COLUMNS codes, a pitch of an odd number of vectors apart, so that neighbouring rows begin in
// different banks. In global memory rows are whole words, for k is a multiple of 32.
template <int BITS, int ROWS, int COLUMNS>
struct CanonicalPiece {
  static constexpr int kWords = COLUMNS / 32 * BITS;
  static constexpr int kPitch = kWords % 8 == 4 ? kWords : kWords + 4;
  static constexpr int kRowVectors = kWords / 4;
  static_assert(kWords % 4 == 0);
  alignas(16) uint32_t words[ROWS * kPitch + 4];  // bit_window may look at the word behind the last

  GEMQ_DEVICE_TOO const uint32_t* row(int r) const { return words + r * kPitch; }
  GEMQ_DEVICE_TOO uint32_t* row(int r) { return words + r * kPitch; }

  // From row row0 and column chunk * COLUMNS of the matrix on; zeros for what lies outside it.
  GEMQ_DEVICE_TOO void load(const RepackTileArgs& a, int64_t row0, int64_t chunk, int thread) {
    const int64_t pitch = a.matrix.k / 32 * BITS;
    const uint8_t* src = a.matrix.src_codes + (row0 * pitch + chunk * kWords) * 4;
    const int rows = clipped(a.matrix.n - row0, ROWS), valid = clipped(pitch - chunk * kWords, kWords);
    if (a.vectors) {
      move_vectors<ROWS * kRowVectors>(
          thread,
          [&](int v) {
            const int r = v / kRowVectors, word = v % kRowVectors * 4;
            return r < rows && word < valid ? load_vector(src + (r * pitch + word) * 4) : Vector{};
          },
          [&](int v, const Vector& x) { store_vector(row(v / kRowVectors) + v % kRowVectors * 4, x); });
    } else {
      for (int w = thread; w < ROWS * kWords; w += kThreads) {
        const int r = w / kWords, word = w % kWords;
        row(r)[word] = r < rows && word < valid ? load_word(src + (r * pitch + word) * 4) : 0;
      }
    }
  }

  GEMQ_DEVICE_TOO void store(const RepackTileArgs& a, int64_t row0, int64_t chunk, int thread) const {
    const int64_t pitch = a.matrix.k / 32 * BITS;
    uint8_t* dst = a.matrix.dst_codes + (row0 * pitch + chunk * kWords) * 4;
    const int rows = clipped(a.matrix.n - row0, ROWS), valid = clipped(pitch - chunk * kWords, kWords);
    if (a.vectors) {
      move_vectors<ROWS * kRowVectors>(
          thread, [&](int v) { return load_vector(row(v / kRowVectors) + v % kRowVectors * 4); },
          [&](int v, const Vector& x) {
            const int r = v / kRowVectors, word = v % kRowVectors * 4;
            if (r < rows && word < valid) store_vector(dst + (r * pitch + word) * 4, x);
          });
    } else {
      for (int w = thread; w < ROWS * kWords; w += kThreads) {
        const int r = w / kWords, word = w % kWords;
        if (r < rows && word < valid) store_word(dst + (r * pitch + word) * 4, row(r)[word]);
      }
    }
  }
};

// COUNT words of a tile, contiguous in global memory, in lines of LINE words a pitch apart in shared memory.
template <int COUNT, int LINE, int PITCH>
struct TilePiece {
  static_assert(COUNT % 4 == 0 && LINE % 4 == 0 && PITCH % 4 == 0);

  GEMQ_DEVICE_TOO static int at(int word) { return word / LINE * PITCH + word % LINE; }

  // The words from `count` on are not there.
  GEMQ_DEVICE_TOO static void load(uint32_t* words, const uint8_t* src, int count, bool vectors, int thread) {
    if (vectors) {
      move_vectors<COUNT / 4>(
          thread, [&](int v) { return v * 4 < count ? load_vector(src + v * kVector) : Vector{}; },
          [&](int v, const Vector& x) { store_vector(words + at(v * 4), x); });
    } else {
      for (int w = thread; w < COUNT; w += kThreads) words[at(w)] = w < count ? load_word(src + w * 4) : 0;
    }
  }

  GEMQ_DEVICE_TOO static void store(const uint32_t* words, uint8_t* dst, int count, bool vectors,
                                    int thread) {
    if (vectors) {
      move_vectors<COUNT / 4>(
          thread, [&](int v) { return load_vector(words + at(v * 4)); },
          [&](int v, const Vector& x) {
            if (v * 4 < count) store_vector(dst + v * kVector, x);
          });
    } else {
      for (int w = thread; w < count; w += kThreads) store_word(dst + w * 4, words[at(w)]);
    }
  }
};

}  // namespace gemq
