// GPTQ inside one group at the border to Python: addresses and sizes in, checked. Device 0 is the CPU, 1
// CUDA.
#pragma once

#include <cstdint>

#include "fields.h"

namespace gemq {

struct GptqCall {
  int device;
  uintptr_t block, factor, bits, codes, meta, errors;
  int64_t matrices, n;
  int group, clip, propagate_from, threads = 1;
  uintptr_t stream = 0;
  static constexpr auto fields() {
    using C = GptqCall;
    return std::make_tuple(field("device", &C::device), field("block", &C::block),
                           field("factor", &C::factor), field("bits", &C::bits), field("codes", &C::codes),
                           field("meta", &C::meta), field("errors", &C::errors),
                           field("matrices", &C::matrices), field("n", &C::n), field("group", &C::group),
                           field("clip", &C::clip), field("propagate_from", &C::propagate_from),
                           optional_field("threads", &C::threads), optional_field("stream", &C::stream));
  }
};

struct DescentCall {
  int device;
  uintptr_t products, hessian, bits, meta, codes;
  int64_t matrices, n;
  int group, threads = 1;
  uintptr_t stream = 0;
  static constexpr auto fields() {
    using C = DescentCall;
    return std::make_tuple(field("device", &C::device), field("products", &C::products),
                           field("hessian", &C::hessian), field("bits", &C::bits), field("meta", &C::meta),
                           field("codes", &C::codes), field("matrices", &C::matrices), field("n", &C::n),
                           field("group", &C::group), optional_field("threads", &C::threads),
                           optional_field("stream", &C::stream));
  }
};

void bind_gptq_group(const GptqCall& c);
void bind_descend_codes(const DescentCall& c);

}  // namespace gemq
