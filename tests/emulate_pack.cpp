// The CUDA kernels' bodies and plans, run on the host: every block, every phase, every thread, one after
// another. Compiled and called by test_pack_emulated.py.
#include <cstdio>
#include <vector>

#include "gemq/dispatch.h"
#include "gptq/column_loop.h"
#include "gptq/descent.h"
#include "pack/pack_body.h"
#include "pack/repack_plan.h"

using namespace gemq;

namespace {

// What a Launch does, on one thread. Blocks run from the last to the first: no order is promised. Shared
// memory begins with garbage.
struct Emulate {
  int64_t first, *blocks;  // where to begin, and how many blocks the plan has in all

  template <class Body>
  void operator()(Body, const typename Body::Args& args, int64_t count) const {
    *blocks += count;
    for (int64_t block = count - 1; block >= first; --block) {
      typename Body::Shared shared;
      memset(static_cast<void*>(&shared), 0xcd, sizeof shared);
      for (int t = 0; t < kThreads; ++t) Body::template run<0>(args, block, t, shared);
      if constexpr (Body::kPhases > 1) {
        for (int t = kThreads - 1; t >= 0; --t) Body::template run<1>(args, block, t, shared);
      }
      if constexpr (Body::kPhases > 2) {
        for (int t = 0; t < kThreads; ++t) Body::template run<2>(args, block, t, shared);
      }
    }
  }
};

// The number of blocks, or -1 where a body threw.
template <class F>
int64_t emulated(int64_t first, F&& f) {
  int64_t blocks = 0;
  try {
    f(Emulate{first, &blocks});
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return -1;
  }
  return blocks;
}

}  // namespace

extern "C" {

int64_t emulate_pack(const uint8_t* src, uint8_t* dst, int64_t rows, int64_t k, int bits, int64_t first) {
  const PackArgs args{src, dst, rows, k, bits};
  return emulated(first, [&](auto run) { with_bits(bits, [&](auto b) { plan_pack<b()>(args, run); }); });
}

int64_t emulate_unpack(const uint8_t* src, uint8_t* dst, int64_t rows, int64_t k, int bits, int64_t first) {
  const PackArgs args{src, dst, rows, k, bits};
  return emulated(first, [&](auto run) { with_bits(bits, [&](auto b) { plan_unpack<b()>(args, run); }); });
}

int64_t emulate_dequantize(const uint8_t* src, const uint16_t* meta, void* dst, int64_t rows, int64_t k,
                           int bits, int group_size, int out_type, int64_t first) {
  const DequantizeArgs args{src, meta, dst, rows, k, bits, group_size, static_cast<OutType>(out_type)};
  return emulated(first, [&](auto run) {
    with_bits(bits, [&](auto b) {
      if (out_type == kFloat32) plan_dequantize<b(), Float32>(args, run);
      if (out_type == kFloat16) plan_dequantize<b(), Float16>(args, run);
      if (out_type == kBFloat16) plan_dequantize<b(), BFloat16>(args, run);
    });
  });
}

int64_t emulate_repack(const uint8_t* src_codes, const uint16_t* src_meta, uint8_t* dst_codes,
                       uint16_t* dst_meta, int64_t n, int64_t k, int bits, int group_size, int layout,
                       bool inverse, int64_t first) {
  const RepackArgs args{src_codes, src_meta, dst_codes, dst_meta, n, k, bits, group_size, layout, inverse};
  return emulated(first, [&](auto run) {
    with_bits(bits, [&](auto b) { plan_repack_codes<b()>(args, run); });
    plan_repack_meta(args, run);
  });
}

// csrc/gptq/descent.cu's thread, for each row: column k of a row is kThreads floats after column k - 1.
int64_t emulate_descend(const float* products, const float* hessian, const uint16_t* meta, uint8_t* codes,
                        int64_t rows, int group, int bits, int64_t) {
  std::vector<float> shared(static_cast<size_t>(group) * kThreads);
  for (int64_t row = 0; row < rows; ++row) {
    float* own = shared.data() + row % kThreads;
    const auto column = [&](int k) -> float& { return own[k * kThreads]; };
    for (int k = 0; k < group; ++k) column(k) = products[row * group + k];
    uint8_t* to = codes + row * group;
    descend_columns(
        column, hessian, group, bits, half_to_float(meta[2 * row]),
        [&](int k) { return static_cast<float>(to[k]); },
        [&](int k, float chosen) { to[k] = static_cast<uint8_t>(chosen); });
  }
  return 1;
}

// join_four and split_four of every width, against the plain functions over eight codes.
int check_fours(uint32_t bytes) {
  for (int bits = 1; bits <= kMaxBits; ++bits) {
    bool same = true;
    with_bits(bits, [&](auto b) {
      uint8_t codes[4];
      memcpy(codes, &bytes, 4);
      const uint32_t field = join_four<b()>(bytes);
      same = field == join_codes<b()>(codes, 4);
      const uint32_t back = split_four<b()>(b() == 8 ? field : field | ~0u << (4 * (b() % 8)));
      same = same && back == (bytes & ((1u << b()) - 1) * 0x01010101u);
    });
    if (!same) return bits;
  }
  return 0;
}
}
