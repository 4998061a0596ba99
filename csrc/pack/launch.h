// Launching a kernel on one index a thread, with every error checked.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "gemq/bits.h"

namespace gemq {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

__device__ inline int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// Launches kernel(args...) on at least `count` threads.
template <class... Params, class... Args>
void launch(const char* what, void (*kernel)(Params...), int64_t count, void* stream, const Args&... args) {
  constexpr int kThreads = 256;
  const int64_t blocks = ceil_div(count, kThreads);
  if (blocks > 0x7fffffff)
    throw std::runtime_error(std::string(what) + ": the matrix is too large for one launch");
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  check_cuda(cudaGetLastError(), what);
}

// True if every pointer is a multiple of `bytes`.
template <class... Pointers>
bool aligned_to(int bytes, Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

}  // namespace gemq
