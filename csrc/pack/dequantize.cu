#include <type_traits>

#include "gemq/dispatch.h"
#include "pack/launch.h"
#include "pack/pack.h"

namespace gemq {
namespace {

// BITS bytes: one load when that is a power of two and `at` is aligned to it.
template <int BITS, bool ALIGNED>
__device__ uint64_t load_eight_codes(const uint8_t* at) {
  if constexpr (ALIGNED && BITS == 2) {
    return *reinterpret_cast<const uint16_t*>(at);
  } else if constexpr (ALIGNED && BITS == 4) {
    return *reinterpret_cast<const uint32_t*>(at);
  } else if constexpr (ALIGNED && BITS == 8) {
    return *reinterpret_cast<const uint64_t*>(at);
  } else {
    return load_bytes(at, BITS);
  }
}

// Eight values as 16-byte stores.
template <class T>
__device__ void store_eight(T* at, const T (&values)[8]) {
  uint4 words[sizeof(T) / 2];
  memcpy(words, values, sizeof words);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) reinterpret_cast<uint4*>(at)[i] = words[i];
}

// Eight codes a thread, so that a warp's float16 stores are 512 contiguous bytes. k is whole runs of eight,
// so runs count through rows.
template <int BITS, class Out, bool ALIGNED>
__global__ void dequantize_kernel(DequantizeArgs a, int64_t runs) {
  const int64_t run = thread_index();
  if (run >= runs) return;
  const int64_t group = run * 8 / a.group_size;
  const float s = half_to_float(a.meta[2 * group]), m = half_to_float(a.meta[2 * group + 1]);
  const uint64_t codes = load_eight_codes<BITS, ALIGNED>(a.src + run * BITS);
  typename Out::type values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = Out::round(dequantize_code(split_code<BITS>(codes, i), s, m));
  auto* out = static_cast<typename Out::type*>(a.dst) + run * 8;
  if constexpr (ALIGNED) {
    store_eight(out, values);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = values[i];
  }
}

template <int BITS, class Out>
void launch_dequantize(const DequantizeArgs& args, void* stream) {
  const int64_t runs = args.rows * args.k / 8;
  const bool aligned = aligned_to(16, args.src, args.dst);
  const auto kernel = aligned ? dequantize_kernel<BITS, Out, true> : dequantize_kernel<BITS, Out, false>;
  launch("dequantize", kernel, runs, stream, args, runs);
}

}  // namespace

void dequantize_cuda(const DequantizeArgs& args, void* stream) {
  with_bits(args.bits, [&](auto bits) {
    switch (args.out_type) {
      case kFloat32:
        return launch_dequantize<bits(), Float32>(args, stream);
      case kFloat16:
        return launch_dequantize<bits(), Float16>(args, stream);
      case kBFloat16:
        return launch_dequantize<bits(), BFloat16>(args, stream);
    }
  });
}

}  // namespace gemq
