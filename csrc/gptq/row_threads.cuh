// A thread for each row of many matrices, its columns in shared memory.
#pragma once

#include "pack/launch.h"

namespace gemq {

constexpr int kRowThreads = 64;

// Column k of this thread's row: neighbours in a warp are neighbours in shared memory.
struct SharedColumns {
  float* at;
  GEMQ_DEVICE_TOO float& operator()(int k) const { return at[k * kRowThreads]; }
};

// Where this thread's row is among those of all matrices; blockIdx.y is the matrix. -1: past its rows.
template <class Args>
__device__ int64_t row_of_thread(const Args& a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  return row < a.n ? blockIdx.y * a.n + row : -1;
}

// This thread's row, read into shared memory.
__device__ inline SharedColumns columns_of(const float* row, int group) {
  extern __shared__ float memory[];
  const SharedColumns columns{memory + threadIdx.x};
  for (int k = 0; k < group; ++k) columns(k) = row[k];
  return columns;
}

// Row blockIdx.x * kRowThreads + threadIdx.x of matrix blockIdx.y, with a column of floats for each of
// a.group.
template <class Args>
void launch_rows(void (*kernel)(Args), const Args& a, void* stream, const char* what) {
  constexpr int64_t kMostMatrices = 65535, kMostBlocks = 0x7fffffff;
  const int64_t blocks = ceil_div(a.n, kRowThreads);
  if (a.matrices > kMostMatrices || blocks > kMostBlocks) {
    throw std::runtime_error(std::string(what) + ": too many matrices or rows for one launch");
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(a.matrices));
  const size_t shared = sizeof(float) * kRowThreads * a.group;
  kernel<<<grid, kRowThreads, shared, static_cast<cudaStream_t>(stream)>>>(a);
  check_cuda(cudaGetLastError(), what);
}

}  // namespace gemq
