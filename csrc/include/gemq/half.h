// float16 and bfloat16 as bit patterns, rounded to nearest even, without hardware support on the host.
#pragma once

#include <cstring>

#include "gemq/host_device.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace gemq {

GEMQ_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

GEMQ_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

GEMQ_HD float half_to_float(uint16_t half) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(half));
#else
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000u | ((rest & 0x3ff) << 13));
  // Subnormals are rest * 2^-24, exact in float32.
  if (rest < 0x400) return bits_float(sign | float_bits(static_cast<float>(rest) * 5.9604644775390625e-8f));
  return bits_float(sign | ((rest << 13) + (112u << 23)));
#endif
}

GEMQ_HD uint16_t float_to_half(float value) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = float_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;  // 65520 and up round to infinity
  if (rest < 0x38800000) {
    // Below 2^-14: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded to even by the adder itself.
    const uint32_t shifted = float_bits(bits_float(rest) + 0.5f);
    return sign | static_cast<uint16_t>(shifted - 0x3f000000u);
  }
  const uint32_t odd = (rest >> 13) & 1;
  return sign | static_cast<uint16_t>((rest + 0xfff + odd - (112u << 23)) >> 13);
#endif
}

GEMQ_HD uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace gemq
