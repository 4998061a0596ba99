// Functions of one number, for operations compiled once: kernels of an instruction set have their own.
#pragma once

#include <cmath>

namespace gemq {

inline float sigmoid(float v) { return 1.0f / (1.0f + std::exp(-v)); }

// Above 20 it is its argument to float32's last place, as torch has it.
inline float softplus(float v) { return v > 20.0f ? v : std::log1p(std::exp(v)); }

}  // namespace gemq
