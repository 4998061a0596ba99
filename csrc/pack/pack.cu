#include "gemq/dispatch.h"
#include "pack/launch.h"
#include "pack/pack.h"

namespace gemq {
namespace {

// N words to 4 * N-byte aligned memory with the widest stores that divide it.
template <int N>
__device__ void store_words(uint32_t* at, const uint32_t (&words)[N]) {
  constexpr int kWide = N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < N; i += kWide) {
    if constexpr (kWide == 4) {
      *reinterpret_cast<uint4*>(at + i) = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    } else if constexpr (kWide == 2) {
      *reinterpret_cast<uint2*>(at + i) = make_uint2(words[i], words[i + 1]);
    } else {
      at[i] = words[i];
    }
  }
}

// Rows are whole words: a thread turns 32 codes (two 16-byte loads) into BITS words, and rows do not matter.
template <int BITS>
__global__ void pack_aligned(PackArgs a, int64_t runs) {
  const int64_t run = thread_index();
  if (run >= runs) return;
  uint32_t words[BITS] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 four = reinterpret_cast<const uint4*>(a.src)[run * 2 + half];
    const uint32_t codes[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      add_code<BITS>(words, half * 16 + c, (codes[c / 4] >> (8 * (c % 4))) & ((1u << BITS) - 1));
    }
  }
  store_words<BITS>(reinterpret_cast<uint32_t*>(a.dst) + run * BITS, words);
}

// Any k and any pointer: eight codes are whole bytes.
template <int BITS>
__global__ void pack_any(PackArgs a) {
  const int64_t runs = ceil_div(a.k, 8), row = thread_index() / runs, run = thread_index() % runs;
  if (row >= a.rows) return;
  const int count = static_cast<int>(min(static_cast<int64_t>(8), a.k - run * 8));
  store_bytes(a.dst + row * row_bytes(a.k, BITS) + run * BITS,
              join_codes<BITS>(a.src + row * a.k + run * 8, count), static_cast<int>(row_bytes(count, BITS)));
}

// A thread writes 16 codes with one store. Byte loads: a warp's are neighbours, so they merge in L1.
template <int BITS>
__global__ void unpack_aligned(PackArgs a, int64_t runs) {
  const int64_t run = thread_index();
  if (run >= runs) return;
  uint32_t codes[4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint64_t value = load_bytes(a.src + (run * 2 + half) * BITS, BITS);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      codes[half * 2 + c / 4] |= static_cast<uint32_t>(split_code<BITS>(value, c)) << (8 * (c % 4));
    }
  }
  reinterpret_cast<uint4*>(a.dst)[run] = make_uint4(codes[0], codes[1], codes[2], codes[3]);
}

template <int BITS>
__global__ void unpack_any(PackArgs a) {
  const int64_t runs = ceil_div(a.k, 8), row = thread_index() / runs, run = thread_index() % runs;
  if (row >= a.rows) return;
  const int count = static_cast<int>(min(static_cast<int64_t>(8), a.k - run * 8));
  const uint64_t value =
      load_bytes(a.src + row * row_bytes(a.k, BITS) + run * BITS, static_cast<int>(row_bytes(count, BITS)));
  for (int i = 0; i < count; ++i) a.dst[row * a.k + run * 8 + i] = split_code<BITS>(value, i);
}

}  // namespace

void pack_cuda(const PackArgs& args, void* stream) {
  with_bits(args.bits, [&](auto bits) {
    if (args.k % 32 == 0 && aligned_to(16, args.src, args.dst)) {
      const int64_t runs = args.rows * args.k / 32;
      launch("pack", pack_aligned<bits()>, runs, stream, args, runs);
    } else {
      launch("pack", pack_any<bits()>, args.rows * ceil_div(args.k, 8), stream, args);
    }
  });
}

void unpack_cuda(const PackArgs& args, void* stream) {
  with_bits(args.bits, [&](auto bits) {
    if (args.k % 16 == 0 && aligned_to(16, args.dst)) {
      const int64_t runs = args.rows * args.k / 16;
      launch("unpack", unpack_aligned<bits()>, runs, stream, args, runs);
    } else {
      launch("unpack", unpack_any<bits()>, args.rows * ceil_div(args.k, 8), stream, args);
    }
  });
}

}  // namespace gemq
