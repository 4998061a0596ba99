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

// All rows of all matrices.
struct GptqGroup {
  const float* block;   // [matrices][n][group]
  const float* factor;  // [matrices][group][group]
  const int32_t* bits;  // [matrices]
  uint8_t* codes;       // [matrices][n][group]
  uint16_t* meta;       // [matrices][n][2]
  float* errors;        // [matrices][n][group]
  int64_t matrices, n;
  int group;
  Clip clip;
  int propagate_from;  // the smallest width whose errors are propagated
};

void gptq_group_cpu(const GptqGroup& args, int threads);

// Launches on `stream` and returns at once; throws std::runtime_error when CUDA refuses.
void gptq_group_cuda(const GptqGroup& args, void* stream);

}  // namespace gemq
