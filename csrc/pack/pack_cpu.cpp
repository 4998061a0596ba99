#include "gemq/bits.h"
#include "gemq/dispatch.h"
#include "gemq/parallel.h"
#include "pack/pack.h"

namespace gemq {
namespace {

// Calls f(row, first code, codes) for runs of eight codes; rows of one long vector are split over threads
// too.
template <class F>
void for_each_run(int64_t rows, int64_t k, int threads, F&& f) {
  const int64_t runs = ceil_div(k, 8);
  parallel(threads, [&](Team team) {
    const Range mine = team.share(rows * runs);
    for (int64_t at = mine.begin; at < mine.end;) {
      const int64_t row = at / runs;
      const int64_t stop = mine.end < (row + 1) * runs ? mine.end : (row + 1) * runs;
      for (int64_t run = at - row * runs; at < stop; ++at, ++run) {
        const int64_t left = k - run * 8;
        f(row, run, left < 8 ? static_cast<int>(left) : 8);
      }
    }
  });
}

template <int BITS>
void pack_rows(const PackArgs& a, int threads) {
  const int64_t bytes = row_bytes(a.k, BITS);
  for_each_run(a.rows, a.k, threads, [&](int64_t row, int64_t run, int count) {
    const uint8_t* codes = a.src + row * a.k + run * 8;
    uint8_t* out = a.dst + row * bytes + run * BITS;
    if (count == 8) {
      const uint64_t low = join_four<BITS>(load_word(codes)), high = join_four<BITS>(load_word(codes + 4));
      store_bytes(out, low | high << (4 * BITS), BITS);
    } else {
      store_bytes(out, join_codes<BITS>(codes, count), static_cast<int>(row_bytes(count, BITS)));
    }
  });
}

template <int BITS>
void unpack_rows(const PackArgs& a, int threads) {
  const int64_t bytes = row_bytes(a.k, BITS);
  for_each_run(a.rows, a.k, threads, [&](int64_t row, int64_t run, int count) {
    const uint8_t* in = a.src + row * bytes + run * BITS;
    uint8_t* codes = a.dst + row * a.k + run * 8;
    if (count == 8) {
      const uint64_t value = load_bytes(in, BITS);
      store_word(codes, split_four<BITS>(static_cast<uint32_t>(value)));
      store_word(codes + 4, split_four<BITS>(static_cast<uint32_t>(value >> (4 * BITS))));
      return;
    }
    const uint64_t value = load_bytes(in, static_cast<int>(row_bytes(count, BITS)));
    for (int i = 0; i < count; ++i) codes[i] = split_code<BITS>(value, i);
  });
}

template <int BITS, class Out>
void dequantize_rows(const DequantizeArgs& a, int threads) {
  const int64_t bytes = row_bytes(a.k, BITS), groups = a.k / a.group_size;
  auto* dst = static_cast<typename Out::type*>(a.dst);
  parallel(threads, [&](Team team) {
    const Range mine = team.share(a.rows * groups);
    for (int64_t at = mine.begin; at < mine.end; ++at) {
      const int64_t row = at / groups, first = (at - row * groups) * a.group_size;
      const float s = half_to_float(a.meta[2 * at]), m = half_to_float(a.meta[2 * at + 1]);
      const uint8_t* in = a.src + row * bytes + first / 8 * BITS;
      auto* out = dst + row * a.k + first;
      for (int c = 0; c < a.group_size; c += 8, in += BITS) {
        const uint64_t value = load_bytes(in, BITS);
        for (int i = 0; i < 8; ++i)
          out[c + i] = Out::round(dequantize_code(split_code<BITS>(value, i), s, m));
      }
    }
  });
}

}  // namespace

void pack_cpu(const PackArgs& args, int threads) {
  with_bits(args.bits, [&](auto bits) { pack_rows<bits()>(args, threads); });
}

void unpack_cpu(const PackArgs& args, int threads) {
  with_bits(args.bits, [&](auto bits) { unpack_rows<bits()>(args, threads); });
}

void dequantize_cpu(const DequantizeArgs& args, int threads) {
  with_bits(args.bits, [&](auto bits) {
    switch (args.out_type) {
      case kFloat32:
        return dequantize_rows<bits(), Float32>(args, threads);
      case kFloat16:
        return dequantize_rows<bits(), Float16>(args, threads);
      case kBFloat16:
        return dequantize_rows<bits(), BFloat16>(args, threads);
    }
  });
}

}  // namespace gemq
