// Coordinate descent over the codes of one group: each column's code becomes the best one for the output
// error when all other codes stay as they are.
#pragma once

#include <cstdint>

namespace gemq {

// All rows of all matrices.
struct CodeDescent {
  const float* products;  // [matrices][n][group]: (weights - quantized) H, in these columns
  const float* hessian;   // [matrices][group][group], the block on the diagonal, itself positive there
  const int32_t* bits;    // [matrices]
  const uint16_t* meta;   // [matrices][n][2], (s, m) as float16, s positive
  uint8_t* codes;         // [matrices][n][group], replaced
  int64_t matrices, n;
  int group;
};

// The same for up to 16 rows of one matrix.
struct CodeDescentRows {
  const float* products;  // [rows][group]
  const float* hessian;   // [group][group]
  const uint16_t* meta;   // [rows][2]
  uint8_t* codes;         // [rows][group]
  int rows, group, bits;
};

void descend_codes_cpu(const CodeDescent& args, int threads);

// Launches on `stream` and returns at once; throws std::runtime_error when CUDA refuses.
void descend_codes_cuda(const CodeDescent& args, void* stream);

}  // namespace gemq
