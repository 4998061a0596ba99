// Repacking of metadata as kernel bodies: a transposition of (row, group) pairs through shared memory.
#pragma once

#include "pack/repack_pieces.h"
#include "pack/repack_rows.h"

namespace gemq {

struct RepackMetaArgs {
  RepackArgs matrix;
  int64_t chunks;
};

template <int LAYOUT, bool INVERSE>
struct RepackMeta {
  using Args = RepackMetaArgs;
  static constexpr int kPhases = 2;
  static constexpr int kRows = LAYOUT == kCpuTile ? kCpuRows : kGpuRows;
  static constexpr int kGroups = 1024 / kRows;
  static constexpr int kPitch = kGroups + 4;
  struct Shared {
    alignas(16) uint32_t pairs[kRows * kPitch];  // s in the low half
  };

  template <int PHASE>
  GEMQ_DEVICE_TOO static void run(const Args& a, int64_t block, int thread, Shared& shared) {
    const int64_t groups = a.matrix.k >> group_log2(a.matrix.group_size);
    const int64_t rows = block / a.chunks, group0 = (block - rows * a.chunks) * kGroups;
    const int valid = clipped(groups - group0, kGroups);
    const auto* src = reinterpret_cast<const uint8_t*>(a.matrix.src_meta);
    auto* dst = reinterpret_cast<uint8_t*>(a.matrix.dst_meta);
    const int64_t plain = (rows * kRows * groups + group0) * 4, tile = (rows * groups + group0) * kRows * 4;
    const int here = clipped(a.matrix.n - rows * kRows, kRows);
    if constexpr (PHASE == 0 && !INVERSE) load_rows(src + plain, groups, here, valid, thread, shared);
    if constexpr (PHASE == 1 && !INVERSE) store_tile(dst + tile, valid, thread, shared);
    if constexpr (PHASE == 0 && INVERSE) load_tile(src + tile, valid, thread, shared);
    if constexpr (PHASE == 1 && INVERSE) store_rows(dst + plain, groups, here, valid, thread, shared);
  }

  // Rows of a number of groups that vectors do not divide go pair by pair.
  GEMQ_DEVICE_TOO static void load_rows(const uint8_t* src, int64_t groups, int rows, int valid, int thread,
                                        Shared& shared) {
    if (groups % 4 == 0) {
      move_vectors<kRows * kGroups / 4>(
          thread,
          [&](int v) {
            const int row = v / (kGroups / 4), group = v % (kGroups / 4) * 4;
            return row < rows && group < valid ? load_vector(src + (row * groups + group) * 4) : Vector{};
          },
          [&](int v, const Vector& x) {
            store_vector(shared.pairs + v / (kGroups / 4) * kPitch + v % (kGroups / 4) * 4, x);
          });
    } else {
      for (int p = thread; p < kRows * kGroups; p += kThreads) {
        const int row = p / kGroups, group = p % kGroups;
        const bool inside = row < rows && group < valid;
        shared.pairs[row * kPitch + group] = inside ? load_word(src + (row * groups + group) * 4) : 0;
      }
    }
  }

  GEMQ_DEVICE_TOO static void store_rows(uint8_t* dst, int64_t groups, int rows, int valid, int thread,
                                         const Shared& shared) {
    if (groups % 4 == 0) {
      move_vectors<kRows * kGroups / 4>(
          thread,
          [&](int v) {
            return load_vector(shared.pairs + v / (kGroups / 4) * kPitch + v % (kGroups / 4) * 4);
          },
          [&](int v, const Vector& x) {
            const int row = v / (kGroups / 4), group = v % (kGroups / 4) * 4;
            if (row < rows && group < valid) store_vector(dst + (row * groups + group) * 4, x);
          });
    } else {
      for (int p = thread; p < kRows * kGroups; p += kThreads) {
        const int row = p / kGroups, group = p % kGroups;
        if (row < rows && group < valid)
          store_word(dst + (row * groups + group) * 4, shared.pairs[row * kPitch + group]);
      }
    }
  }

  // A group of the tile is kRows / 4 vectors: in cpu_tile 8 s or 8 m each, in gpu_tile four pairs.
  GEMQ_DEVICE_TOO static void store_tile(uint8_t* dst, int valid, int thread, const Shared& shared) {
    move_vectors<kRows * kGroups / 4>(
        thread,
        [&](int v) {
          const int group = v / (kRows / 4), part = v % (kRows / 4);
          const auto pair = [&](int row) { return shared.pairs[row * kPitch + group]; };
          Vector x;
          GEMQ_UNROLL
          for (int w = 0; w < 4; ++w) {
            if constexpr (LAYOUT == kCpuTile) {
              const int row = part % 2 * 8 + w * 2, shift = part / 2 * 16;
              x.words[w] = (pair(row) >> shift & 0xffffu) | (pair(row + 1) >> shift) << 16;
            } else {
              x.words[w] = pair(part * 4 + w);
            }
          }
          return x;
        },
        [&](int v, const Vector& x) {
          if (v / (kRows / 4) < valid) store_vector(dst + v * kVector, x);
        });
  }

  GEMQ_DEVICE_TOO static void load_tile(const uint8_t* src, int valid, int thread, Shared& shared) {
    move_vectors<kRows * kGroups / 4>(
        thread, [&](int v) { return v / (kRows / 4) < valid ? load_vector(src + v * kVector) : Vector{}; },
        [&](int v, const Vector& x) {
          const int group = v / (kRows / 4), part = v % (kRows / 4);
          GEMQ_UNROLL
          for (int w = 0; w < 4; ++w) {
            if constexpr (LAYOUT == kCpuTile) {
              const int row = part % 2 * 8 + w * 2;
              put_half(shared, row, group, part / 2, x.words[w]);
              put_half(shared, row + 1, group, part / 2, x.words[w] >> 16);
            } else {
              shared.pairs[(part * 4 + w) * kPitch + group] = x.words[w];
            }
          }
        });
  }

  GEMQ_DEVICE_TOO static void put_half(Shared& shared, int row, int group, int which, uint32_t value) {
    auto* at = reinterpret_cast<uint8_t*>(shared.pairs + row * kPitch + group) + 2 * which;
    store_half_word(at, static_cast<uint16_t>(value));
  }
};

// Any address of float16 elements.
struct RepackMetaAny {
  using Args = RepackMetaArgs;
  using Shared = NothingShared;
  static constexpr int kPhases = 1;

  template <int PHASE>
  GEMQ_DEVICE_TOO static void run(const Args& a, int64_t block, int thread, Shared&) {
    const int64_t groups = a.matrix.k >> group_log2(a.matrix.group_size);
    const int64_t index = block * kThreads + thread, row = index / groups;
    if (row < repack_rows(a.matrix)) repack_meta(a.matrix, row, index - row * groups);
  }
};

}  // namespace gemq
