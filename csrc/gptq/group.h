// GPTQ's column loop inside one group, for up to 16 rows of one matrix.
#pragma once

#include <cstdint>

namespace gemq {

enum class Clip : int { kNone = 0, kPaper = 1, kMse = 2 };

struct GptqRows {
  const float* block;   // [rows][group]
  const float* factor;  // [group][group], upper triangular
  int rows, group, bits;
  Clip clip;
  bool propagate;
  uint8_t* codes;  // [rows][group]
  uint16_t* meta;  // [rows][2], (s, m) as float16
  float* errors;   // [rows][group]
};

// All rows of all matrices: block [matrices][n][group], factor [matrices][group][group], bits [matrices].
void gptq_group(const float* block, const float* factor, const int32_t* bits, uint8_t* codes, uint16_t* meta,
                float* errors, int64_t matrices, int64_t n, int group, Clip clip, int propagate_from,
                int threads);

}  // namespace gemq
