#pragma once

#include <cstdint>

namespace gemq {

void bind_gptq_group(int device, uintptr_t block, uintptr_t factor, uintptr_t bits, uintptr_t codes,
                     uintptr_t meta, uintptr_t errors, int64_t matrices, int64_t n, int group, int clip,
                     int propagate_from, int threads, uintptr_t stream);

void bind_descend_codes(int device, uintptr_t products, uintptr_t hessian, uintptr_t bits, uintptr_t meta,
                        uintptr_t codes, int64_t matrices, int64_t n, int group, int threads,
                        uintptr_t stream);

}  // namespace gemq
