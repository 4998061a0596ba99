// Marks the format's arithmetic so that one text serves the CPU, CUDA and the tests.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GEMQ_DEVICE_TOO __host__ __device__
#else
#define GEMQ_DEVICE_TOO
#endif

// static: files compiled with different instruction sets must never share one merged copy of a function.
#define GEMQ_HD GEMQ_DEVICE_TOO static inline

#ifdef __CUDACC__
#define GEMQ_UNROLL _Pragma("unroll")
#define GEMQ_UNROLL_4 _Pragma("unroll 4")
#else
#define GEMQ_UNROLL_4
#define GEMQ_UNROLL _Pragma("GCC unroll 64")
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "gemq stores little-endian words and needs a little-endian machine"
#endif
