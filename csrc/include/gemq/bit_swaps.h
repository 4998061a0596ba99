// Permutations of bits that exchange two binary digits of every bit's index: four instructions for 32 bits,
// however small the codes are. Layouts of widths 1, 2 and 4 differ by such permutations alone.
#pragma once

#include "gemq/host_device.h"

namespace gemq {

// Bits of a word whose index has digit `set` 1 and, if it is not -1, digit `clear` 0.
GEMQ_DEVICE_TOO constexpr uint32_t index_mask(int set, int clear) {
  uint32_t mask = 0;
  for (int bit = 0; bit < 32; ++bit) {
    if ((bit >> set & 1) != 0 && (clear < 0 || (bit >> clear & 1) == 0)) mask |= 1u << bit;
  }
  return mask;
}

// Exchanges digits LOW < HIGH of the index of every bit of x.
template <int LOW, int HIGH>
GEMQ_HD uint32_t swap_digits(uint32_t x) {
  constexpr int kDistance = (1 << HIGH) - (1 << LOW);
  constexpr uint32_t kMask = index_mask(LOW, HIGH);
  const uint32_t moved = ((x >> kDistance) ^ x) & kMask;
  return x ^ moved ^ (moved << kDistance);
}

// Exchanges digit D of the bits' index with the digit of the words' index in which `zero` and `one` differ.
template <int D>
GEMQ_HD void swap_with_word(uint32_t& zero, uint32_t& one) {
  constexpr uint32_t kMask = ~index_mask(D, -1);
  const uint32_t moved = ((zero >> (1 << D)) ^ one) & kMask;
  one ^= moved;
  zero ^= moved << (1 << D);
}

// Moves digit D to the top, the digits above it down by one; the inverse moves it back.
template <int D>
GEMQ_HD uint32_t lift_digit(uint32_t x) {
  if constexpr (D < 4) x = lift_digit<D + 1>(swap_digits<D, D + 1>(x));
  return x;
}
template <int D>
GEMQ_HD uint32_t lower_digit(uint32_t x) {
  if constexpr (D < 4) x = swap_digits<D, D + 1>(lower_digit<D + 1>(x));
  return x;
}

// Digits D..3 of the words' index against the same digits of the bits' index, for 16 words. Its own inverse.
template <int D>
GEMQ_HD void transpose_digits(uint32_t (&words)[16]) {
  if constexpr (D < 4) {
    GEMQ_UNROLL
    for (int w = 0; w < 16; ++w) {
      if ((w >> D & 1) == 0) swap_with_word<D>(words[w], words[w | 1 << D]);
    }
    transpose_digits<D + 1>(words);
  }
}

}  // namespace gemq
