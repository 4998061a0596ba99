// Kernel bodies as kernels, and their launch with every error checked.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "pack/vectors.h"

namespace gemq {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

template <class Body>
__global__ void __launch_bounds__(kThreads) body_kernel(const typename Body::Args args) {
  static_assert(Body::kPhases <= 3);
  __shared__ typename Body::Shared shared;
  const int64_t block = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  Body::template run<0>(args, block, thread, shared);
  if constexpr (Body::kPhases > 1) {
    __syncthreads();
    Body::template run<1>(args, block, thread, shared);
  }
  if constexpr (Body::kPhases > 2) {
    __syncthreads();
    Body::template run<2>(args, block, thread, shared);
  }
}

// What the plans call: launches the body on `stream`.
struct Launch {
  const char* what;
  void* stream;

  template <class Body>
  void operator()(Body, const typename Body::Args& args, int64_t blocks) const {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff)
      throw std::runtime_error(std::string(what) + ": the matrix is too large for one launch");
    body_kernel<Body>
        <<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    check_cuda(cudaGetLastError(), what);
  }
};

}  // namespace gemq
