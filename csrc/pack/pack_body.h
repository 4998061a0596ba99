// pack, unpack and dequantize as kernel bodies (vectors.h says what those are), and which body serves a call.
//
// Where eight codes start at a byte (k % 8 == 0), rows do not matter: codes are one long stream, cut into
// tiles of kTileCodes, 16-byte accesses on both sides. Everything else goes by eight codes a thread, byte by
// byte.
#pragma once

#include "pack/pack.h"
#include "pack/vectors.h"

namespace gemq {

constexpr int kTileCodes = kThreads * 4 * kVector;

// Bytes of `total` units that are left from tile * per_tile on.
GEMQ_HD int64_t left_from(int64_t total, int64_t tile, int64_t per_tile) { return total - tile * per_tile; }

template <int BITS>
struct PackTile {
  using Args = PackArgs;
  static constexpr int kPhases = 2;
  static constexpr int kBytes = kTileCodes / 8 * BITS;
  struct Shared {
    alignas(16) uint8_t packed[kBytes];
  };

  // 16 codes of a vector are BITS half words.
  template <int PHASE>
  GEMQ_DEVICE_TOO static void run(const Args& a, int64_t block, int thread, Shared& shared) {
    const int64_t total = a.rows * a.k;
    if constexpr (PHASE == 0) {
      const uint8_t* src = a.src + block * kTileCodes;
      const int64_t left = left_from(total, block, kTileCodes);
      if_whole(left >= kTileCodes, [&](auto whole) {
        move_vectors<kTileCodes / kVector>(
            thread, [&](int v) { return load_part<whole()>(src + v * kVector, left - v * kVector); },
            [&](int v, const Vector& codes) { put(shared.packed + v * 2 * BITS, codes); });
      });
    } else {
      uint8_t* dst = a.dst + block * kBytes;
      const int64_t left = left_from(total / 8 * BITS, block, kBytes);
      if_whole(left >= kBytes, [&](auto whole) {
        move_vectors<kBytes / kVector>(
            thread, [&](int v) { return load_vector(shared.packed + v * kVector); },
            [&](int v, const Vector& p) { store_part<whole()>(dst + v * kVector, p, left - v * kVector); });
      });
    }
  }

  GEMQ_DEVICE_TOO static void put(uint8_t* at, const Vector& codes) {
    uint64_t low = join_four<BITS>(codes.words[0]), high = join_four<BITS>(codes.words[2]);
    low |= static_cast<uint64_t>(join_four<BITS>(codes.words[1])) << (4 * BITS);
    high |= static_cast<uint64_t>(join_four<BITS>(codes.words[3])) << (4 * BITS);
    if constexpr (BITS == 8) {
      store_vector(at, {{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                         static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)}});
    } else {
      // low and high are 8 * BITS bits each
      const uint64_t first = low | high << (8 * BITS), second = high >> (64 - 8 * BITS);
      GEMQ_UNROLL
      for (int i = 0; i < BITS; ++i) {
        const uint64_t part = i < 4 ? first >> (16 * i) : second >> (16 * (i - 4));
        if constexpr (BITS % 2 == 0) {
          if (i % 2 == 0) store_word(at + 2 * i, static_cast<uint32_t>(part));
        } else {
          store_half_word(at + 2 * i, static_cast<uint16_t>(part));
        }
      }
    }
  }
};

// Any k, any address.
template <int BITS>
struct PackAny {
  using Args = PackArgs;
  using Shared = NothingShared;
  static constexpr int kPhases = 1;

  template <int PHASE>
  GEMQ_DEVICE_TOO static void run(const Args& a, int64_t block, int thread, Shared&) {
    const int64_t runs = ceil_div(a.k, 8), index = block * kThreads + thread;
    const int64_t row = index / runs, run = index - row * runs;
    if (row >= a.rows) return;
    const int count = a.k - run * 8 < 8 ? static_cast<int>(a.k - run * 8) : 8;
    store_bytes(a.dst + row * row_bytes(a.k, BITS) + run * BITS,
                join_codes<BITS>(a.src + row * a.k + run * 8, count),
                static_cast<int>(row_bytes(count, BITS)));
  }
};

// A tile of packed codes in shared memory, with the word that bit_window reads behind it.
template <int BITS>
struct PackedTile {
  static constexpr int kBytes = kTileCodes / 8 * BITS;
  alignas(16) uint32_t words[kBytes / 4 + 4];

  GEMQ_DEVICE_TOO void load(const uint8_t* src, int64_t total, int64_t block, int thread) {
    const int64_t left = left_from(total / 8 * BITS, block, kBytes);
    src += block * kBytes;
    if_whole(left >= kBytes, [&](auto whole) {
      move_vectors<kBytes / kVector>(
          thread, [&](int v) { return load_part<whole()>(src + v * kVector, left - v * kVector); },
          [&](int v, const Vector& packed) { store_vector(words + v * 4, packed); });
    });
  }
};

template <int BITS>
struct UnpackTile {
  using Args = PackArgs;
  using Shared = PackedTile<BITS>;
  static constexpr int kPhases = 2;

  template <int PHASE>
  GEMQ_DEVICE_TOO static void run(const Args& a, int64_t block, int thread, Shared& shared) {
    const int64_t total = a.rows * a.k;
    if constexpr (PHASE == 0) {
      shared.load(a.src, total, block, thread);
    } else {
      uint8_t* dst = a.dst + block * kTileCodes;
      const int64_t left = left_from(total, block, kTileCodes);
      if_whole(left >= kTileCodes, [&](auto whole) {
        GEMQ_UNROLL
        for (int i = 0; i < kTileCodes / kVector / kThreads; ++i) {
          const int v = thread + i * kThreads;
          store_part<whole()>(dst + v * kVector, vector(shared, v), left - v * kVector);
        }
      });
    }
  }

  GEMQ_DEVICE_TOO static Vector vector(const Shared& shared, int v) {
    Vector codes;
    GEMQ_UNROLL
    for (int q = 0; q < 4; ++q) {
      codes.words[q] = split_four<BITS>(bit_window<4 * BITS>(shared.words, (v * 4 + q) * 4 * BITS));
    }
    return codes;
  }
};

template <int BITS>
struct UnpackAny {
  using Args = PackArgs;
  using Shared = NothingShared;
  static constexpr int kPhases = 1;

  template <int PHASE>
  GEMQ_DEVICE_TOO static void run(const Args& a, int64_t block, int thread, Shared&) {
    const int64_t runs = ceil_div(a.k, 8), index = block * kThreads + thread;
    const int64_t row = index / runs, run = index - row * runs;
    if (row >= a.rows) return;
    const int count = a.k - run * 8 < 8 ? static_cast<int>(a.k - run * 8) : 8;
    const uint64_t value =
        load_bytes(a.src + row * row_bytes(a.k, BITS) + run * BITS, static_cast<int>(row_bytes(count, BITS)));
    for (int i = 0; i < count; ++i) a.dst[row * a.k + run * 8 + i] = split_code<BITS>(value, i);
  }
};

template <int BITS, class Out>
struct DequantizeTile {
  using Args = DequantizeArgs;
  using Element = typename Out::type;
  static constexpr int kPhases = 2;
  static constexpr int kEach = kVector / static_cast<int>(sizeof(Element));  // codes of a vector: 8 or 4
  struct Shared {
    PackedTile<BITS> codes;
    alignas(16) uint32_t pairs[kTileCodes / 32];  // (s, m), s in the low half
  };

  template <int PHASE>
  GEMQ_DEVICE_TOO static void run(const Args& a, int64_t block, int thread, Shared& shared) {
    const int64_t total = a.rows * a.k;
    const int log2 = group_log2(a.group_size);
    if constexpr (PHASE == 0) {
      const int64_t left = (total >> log2) * 4 - block * (kTileCodes >> log2) * 4;
      const auto* meta = reinterpret_cast<const uint8_t*>(a.meta) + block * (kTileCodes >> log2) * 4;
      if (thread < (kTileCodes >> log2) / 4) {
        store_vector(shared.pairs + thread * 4,
                     load_part<false>(meta + thread * kVector, left - thread * kVector));
      }
      shared.codes.load(a.src, total, block, thread);
    } else {
      auto* dst = static_cast<Element*>(a.dst) + block * kTileCodes;
      const int64_t left = left_from(total, block, kTileCodes);
      if_whole(left >= kTileCodes, [&](auto whole) {
        GEMQ_UNROLL_4
        for (int v = thread; v < kTileCodes / kEach; v += kThreads) {
          // k is a multiple of 32, so vectors are whole
          if (whole() || v * kEach < left) store_vector(dst + v * kEach, vector(shared, v, log2));
        }
      });
    }
  }

  GEMQ_DEVICE_TOO static Vector vector(const Shared& shared, int v, int log2) {
    const uint32_t pair = shared.pairs[v * kEach >> log2];
    const float s = half_to_float(static_cast<uint16_t>(pair));
    const float m = half_to_float(static_cast<uint16_t>(pair >> 16));
    Element values[kEach];
    GEMQ_UNROLL
    for (int q = 0; q < kEach / 4; ++q) {
      const uint32_t field = bit_window<4 * BITS>(shared.codes.words, (v * kEach + q * 4) * BITS);
      GEMQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        const uint32_t code = (field >> (BITS * i)) & ((1u << BITS) - 1);
        values[q * 4 + i] = Out::round(dequantize_code(code, s, m));
      }
    }
    Vector out;
    memcpy(&out, values, sizeof out);
    return out;
  }
};

template <int BITS, class Out>
struct DequantizeAny {
  using Args = DequantizeArgs;
  using Shared = NothingShared;
  static constexpr int kPhases = 1;

  template <int PHASE>
  GEMQ_DEVICE_TOO static void run(const Args& a, int64_t block, int thread, Shared&) {
    const int64_t first = (block * kThreads + thread) * 8;
    if (first >= a.rows * a.k) return;
    const int64_t group = first >> group_log2(a.group_size);
    const float s = half_to_float(a.meta[2 * group]), m = half_to_float(a.meta[2 * group + 1]);
    const uint64_t codes = load_bytes(a.src + first / 8 * BITS, BITS);
    auto* out = static_cast<typename Out::type*>(a.dst) + first;
    GEMQ_UNROLL
    for (int i = 0; i < 8; ++i) out[i] = Out::round(dequantize_code(split_code<BITS>(codes, i), s, m));
  }
};

// run(Body(), args, blocks) with the body that serves the call.
template <int BITS, class Run>
void plan_pack(const PackArgs& a, Run&& run) {
  if (a.k % 8 == 0 && aligned_to(kVector, a.src, a.dst)) {
    run(PackTile<BITS>(), a, ceil_div(a.rows * a.k, kTileCodes));
  } else {
    run(PackAny<BITS>(), a, ceil_div(a.rows * ceil_div(a.k, 8), kThreads));
  }
}

template <int BITS, class Run>
void plan_unpack(const PackArgs& a, Run&& run) {
  if (a.k % 8 == 0 && aligned_to(kVector, a.src, a.dst)) {
    run(UnpackTile<BITS>(), a, ceil_div(a.rows * a.k, kTileCodes));
  } else {
    run(UnpackAny<BITS>(), a, ceil_div(a.rows * ceil_div(a.k, 8), kThreads));
  }
}

template <int BITS, class Out, class Run>
void plan_dequantize(const DequantizeArgs& a, Run&& run) {
  if (aligned_to(kVector, a.src, a.meta, a.dst)) {
    run(DequantizeTile<BITS, Out>(), a, ceil_div(a.rows * a.k, kTileCodes));
  } else {
    run(DequantizeAny<BITS, Out>(), a, ceil_div(a.rows * a.k / 8, kThreads));
  }
}

}  // namespace gemq
