// Coordinate descent over codes on the CPU. Compiled once for each instruction set, see moe_cpu/vectors.h; a
// lane is a row.
#include "gptq/column_loop.h"
#include "gptq/descent.h"
#include "moe_cpu/vectors.h"

namespace gemq {
namespace {

// kLanes rows from `first`, of which `count` exist.
void some_rows(const CodeDescentRows& a, int first, int count) {
  float products[kMaxGroup][kLanes] __attribute__((aligned(64)));
  float codes[kMaxGroup][kLanes] __attribute__((aligned(64)));
  for (int k = 0; k < a.group; ++k) {
    for (int r = 0; r < kLanes; ++r) {
      const int64_t at = static_cast<int64_t>(first + r) * a.group + k;
      products[k][r] = r < count ? a.products[at] : 0.0f;
      codes[k][r] = r < count ? static_cast<float>(a.codes[at]) : 0.0f;
    }
  }
  const auto product = [&](int k) -> Float& { return *reinterpret_cast<Float*>(products[k]); };
  const auto code = [&](int k) -> Float& { return *reinterpret_cast<Float*>(codes[k]); };
  Float scale = broadcast(1.0f);
  for (int r = 0; r < count; ++r) scale[r] = half_to_float(a.meta[2 * (first + r)]);
  descend_columns(product, a.hessian, a.group, a.bits, scale, code,
                  [&](int k, Float chosen) { code(k) = chosen; });
  for (int r = 0; r < count; ++r) {
    uint8_t* to = a.codes + static_cast<int64_t>(first + r) * a.group;
    for (int k = 0; k < a.group; ++k) to[k] = static_cast<uint8_t>(codes[k][r]);
  }
}

}  // namespace

namespace GEMQ_VARIANT {

void descend_codes(const CodeDescentRows& args) {
  for (int first = 0; first < args.rows; first += kLanes) {
    some_rows(args, first, args.rows - first < kLanes ? args.rows - first : kLanes);
  }
}

}  // namespace GEMQ_VARIANT
}  // namespace gemq
