// 16-byte accesses and shared-memory staging, and how a kernel's text runs on the device and, block by block
// and thread by thread, in a test on the host.
//
// A body is a struct with Args, Shared, kThreads, kPhases and run<PHASE>(args, block, thread, shared). Phases
// are separated by a barrier, and nothing but `shared` lives across one.
#pragma once

#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "gemq/bits.h"

namespace gemq {

constexpr int kThreads = 128;
constexpr int kVector = 16;  // bytes of an access

struct alignas(16) Vector {
  uint32_t words[4];
};
static_assert(sizeof(Vector) == kVector);

// True if every pointer is a multiple of `bytes`.
template <class... Pointers>
bool aligned_to(int bytes, Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

// A kernel that would fault on the device fails in the host's run of it too.
GEMQ_HD void check_vector(const void* at) {
#ifndef __CUDA_ARCH__
  if (!aligned_to(kVector, at)) throw std::logic_error("a 16-byte access at an unaligned address");
#else
  (void)at;
#endif
}

GEMQ_HD Vector load_vector(const void* at) {
  check_vector(at);
  Vector v;
#ifdef __CUDA_ARCH__
  const uint4 four = *reinterpret_cast<const uint4*>(at);
  v.words[0] = four.x, v.words[1] = four.y, v.words[2] = four.z, v.words[3] = four.w;
#else
  memcpy(&v, at, sizeof v);
#endif
  return v;
}

GEMQ_HD void store_vector(void* at, const Vector& v) {
  check_vector(at);
#ifdef __CUDA_ARCH__
  *reinterpret_cast<uint4*>(at) = make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]);
#else
  memcpy(at, &v, sizeof v);
#endif
}

template <int N>
GEMQ_HD void load_vectors(const uint32_t* at, uint32_t (&words)[N]) {
  GEMQ_UNROLL
  for (int i = 0; i < N; i += 4) {
    const Vector v = load_vector(at + i);
    GEMQ_UNROLL
    for (int j = 0; j < 4; ++j) words[i + j] = v.words[j];
  }
}

template <int N>
GEMQ_HD void store_vectors(uint32_t* at, const uint32_t (&words)[N]) {
  GEMQ_UNROLL
  for (int i = 0; i < N; i += 4) store_vector(at + i, {{words[i], words[i + 1], words[i + 2], words[i + 3]}});
}

GEMQ_HD Vector load_tail(const uint8_t* at, int count) {
  Vector v{};
  GEMQ_UNROLL
  for (int b = 0; b < kVector; ++b) {
    if (b < count) v.words[b / 4] |= static_cast<uint32_t>(at[b]) << (8 * (b % 4));
  }
  return v;
}

GEMQ_HD void store_tail(uint8_t* at, const Vector& v, int count) {
  GEMQ_UNROLL
  for (int b = 0; b < kVector; ++b) {
    if (b < count) at[b] = static_cast<uint8_t>(v.words[b / 4] >> (8 * (b % 4)));
  }
}

// The first `count` bytes of a vector, the rest zeros; all 16 in one access. WHOLE: count is known to be 16
// or more.
template <bool WHOLE>
GEMQ_HD Vector load_part(const uint8_t* at, int64_t count) {
  return WHOLE || count >= kVector ? load_vector(at) : load_tail(at, static_cast<int>(count));
}

template <bool WHOLE>
GEMQ_HD void store_part(uint8_t* at, const Vector& v, int64_t count) {
  WHOLE || count >= kVector ? store_vector(at, v) : store_tail(at, v, static_cast<int>(count));
}

GEMQ_HD uint16_t load_half_word(const uint8_t* at) {
#ifdef __CUDA_ARCH__
  return *reinterpret_cast<const uint16_t*>(at);
#else
  uint16_t half;
  memcpy(&half, at, sizeof half);
  return half;
#endif
}

GEMQ_HD void store_half_word(uint8_t* at, uint16_t half) {
#ifdef __CUDA_ARCH__
  *reinterpret_cast<uint16_t*>(at) = half;
#else
  memcpy(at, &half, sizeof half);
#endif
}

// COUNT vectors by kThreads threads: loads all that are this thread's, then hands them on, so that the loads
// are in flight together. load(index) gives a Vector, store(index, vector) takes it.
template <int COUNT, class Load, class Store>
GEMQ_HD void move_vectors(int thread, Load&& load, Store&& store) {
  constexpr int kEach = (COUNT + kThreads - 1) / kThreads;
  Vector held[kEach];
  GEMQ_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int index = thread + i * kThreads;
    if (COUNT % kThreads == 0 || index < COUNT) held[i] = load(index);
  }
  GEMQ_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int index = thread + i * kThreads;
    if (COUNT % kThreads == 0 || index < COUNT) store(index, held[i]);
  }
}

// f(std::bool_constant): all tiles but the last run text without a tail's branches.
template <class F>
GEMQ_HD void if_whole(bool whole, F&& f) {
  if (whole) {
    f(std::true_type());
  } else {
    f(std::false_type());
  }
}

struct NothingShared {};

}  // namespace gemq
