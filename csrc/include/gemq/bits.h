// The canonical code stream: code j of a row sits in bits [j * bits, (j + 1) * bits), bit 0 first.
// Eight codes are always `bits` whole bytes and 32 codes `bits` whole words, the units everything here works
// in.
#pragma once

#include <cstring>

#include "gemq/half.h"
#include "gemq/host_device.h"

namespace gemq {

constexpr int kMaxBits = 8;

GEMQ_HD int64_t row_bytes(int64_t k, int bits) { return (k * bits + 7) / 8; }

GEMQ_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of a group size of the format. Shifts, because a 64-bit division is a loop on a GPU.
GEMQ_HD int group_log2(int group_size) { return group_size == 128 ? 7 : group_size == 64 ? 6 : 5; }

// On the device `at` must be 4-byte aligned; on the host it need not be.
GEMQ_HD uint32_t load_word(const uint8_t* at) {
#ifdef __CUDA_ARCH__
  return *reinterpret_cast<const uint32_t*>(at);
#else
  uint32_t word;
  memcpy(&word, at, sizeof word);
  return word;
#endif
}

GEMQ_HD void store_word(uint8_t* at, uint32_t word) {
#ifdef __CUDA_ARCH__
  *reinterpret_cast<uint32_t*>(at) = word;
#else
  memcpy(at, &word, sizeof word);
#endif
}

// `count` bytes, at most 8, as one little-endian number; reads nothing beyond them.
GEMQ_HD uint64_t load_bytes(const uint8_t* at, int count) {
  uint64_t value = 0;
  GEMQ_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (i < count) value |= static_cast<uint64_t>(at[i]) << (8 * i);
  }
  return value;
}

GEMQ_HD void store_bytes(uint8_t* at, uint64_t value, int count) {
  GEMQ_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (i < count) at[i] = static_cast<uint8_t>(value >> (8 * i));
  }
}

// Up to eight codes to the bytes they occupy; bits of a code above BITS are dropped.
template <int BITS>
GEMQ_HD uint64_t join_codes(const uint8_t* codes, int count) {
  uint64_t value = 0;
  GEMQ_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (i < count) value |= static_cast<uint64_t>(codes[i] & ((1 << BITS) - 1)) << (BITS * i);
  }
  return value;
}

template <int BITS>
GEMQ_HD uint8_t split_code(uint64_t value, int i) {
  return static_cast<uint8_t>((value >> (BITS * i)) & ((1 << BITS) - 1));
}

// Four codes, one in each byte, to 4 * BITS bits; bits of a byte above BITS are dropped. Two halvings: bytes
// to pairs in 16 bits, pairs to one field.
template <int BITS>
GEMQ_HD uint32_t join_four(uint32_t bytes) {
  bytes &= ((1u << BITS) - 1) * 0x01010101u;
  const uint32_t pairs = (bytes & 0x00ff00ffu) | ((bytes >> (8 - BITS)) & (0x00ff00ffu << BITS));
  return (pairs & 0xffffu) | ((pairs >> (16 - 2 * BITS)) & (0xffffu << (2 * BITS)));
}

// The inverse; bits of `field` above 4 * BITS are ignored.
template <int BITS>
GEMQ_HD uint32_t split_four(uint32_t field) {
  constexpr uint32_t kOne = (1u << BITS) - 1, kTwo = (1u << (2 * BITS)) - 1;
  const uint32_t pairs = (field & kTwo) | ((field << (16 - 2 * BITS)) & (kTwo << 16));
  return (pairs & kOne * 0x00010001u) | ((pairs << (8 - BITS)) & (kOne * 0x01000100u));
}

// WIDTH bits of a stream of words, and what follows them, from a bit that is a multiple of WIDTH. Reads the
// word behind those of the WIDTH bits too, unless fields of WIDTH never cross a word.
template <int WIDTH>
GEMQ_HD uint32_t bit_window(const uint32_t* words, int bit) {
  const int word = bit >> 5, shift = bit & 31;
  if constexpr (32 % WIDTH == 0) {
    return words[word] >> shift;
  } else {
    return static_cast<uint32_t>((static_cast<uint64_t>(words[word + 1]) << 32 | words[word]) >> shift);
  }
}

// Code c of 32 codes held in BITS words.
template <int BITS>
GEMQ_HD uint32_t code_of(const uint32_t (&words)[BITS], int c) {
  const int word = c * BITS / 32, bit = c * BITS % 32;
  uint32_t value = words[word] >> bit;
  if (bit + BITS > 32) value |= words[word + 1 < BITS ? word + 1 : word] << (32 - bit);
  return value & ((1u << BITS) - 1);
}

// Adds code c to words that start at zero.
template <int BITS>
GEMQ_HD void add_code(uint32_t (&words)[BITS], int c, uint32_t code) {
  const int word = c * BITS / 32, bit = c * BITS % 32;
  words[word] |= code << bit;
  if (bit + BITS > 32) words[word + 1 < BITS ? word + 1 : word] |= code >> (32 - bit);
}

// Columns c and c + 1 of a row, c even, as code | code << BITS. The row must be whole words.
template <int BITS>
GEMQ_HD uint32_t load_pair(const uint8_t* row, int64_t c) {
  const int64_t bit = c * BITS;
  const int shift = static_cast<int>(bit & 31);
  uint32_t value = load_word(row + (bit >> 5) * 4) >> shift;
  if (shift + 2 * BITS > 32) value |= load_word(row + (bit >> 5) * 4 + 4) << (32 - shift);
  return value & ((1u << (2 * BITS)) - 1);
}

// q * s is exact in float32 (8 + 11 significant bits), so fused or not, this rounds once.
GEMQ_HD float dequantize_code(uint32_t code, float s, float m) { return static_cast<float>(code) * s + m; }

// The element types dequantize writes, numbered as in the bindings.
struct Float32 {
  using type = float;
  GEMQ_DEVICE_TOO static type round(float value) { return value; }
};
struct Float16 {
  using type = uint16_t;
  GEMQ_DEVICE_TOO static type round(float value) { return float_to_half(value); }
};
struct BFloat16 {
  using type = uint16_t;
  GEMQ_DEVICE_TOO static type round(float value) { return float_to_bf16(value); }
};

}  // namespace gemq
