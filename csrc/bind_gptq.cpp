#include "bind_gptq.h"

#include "checks.h"
#include "gptq/descent.h"
#include "gptq/group.h"

namespace gemq {

namespace {

void check_sizes(int64_t matrices, int64_t n, int group) {
  check_at_least("matrices", matrices, 1);
  check_at_least("n", n, 1);
  if (group != 32 && group != 64 && group != 128) bad_value("group", group, "32, 64 or 128");
}

void check_widths(const int32_t* bits, int64_t matrices) {
  for (int64_t matrix = 0; matrix < matrices; ++matrix) {
    check_range("bits[" + std::to_string(matrix) + "]", bits[matrix], 1, 8);
  }
}

}  // namespace

void bind_gptq_group(int device, uintptr_t block, uintptr_t factor, uintptr_t bits, uintptr_t codes,
                     uintptr_t meta, uintptr_t errors, int64_t matrices, int64_t n, int group, int clip,
                     int propagate_from, int threads, uintptr_t stream) {
  check_pointer("block", block);
  check_pointer("factor", factor);
  check_pointer("bits", bits);
  check_pointer("codes", codes);
  check_pointer("meta", meta);
  check_pointer("errors", errors);
  check_sizes(matrices, n, group);
  check_range("clip", clip, 0, 2);
  const GptqGroup args{reinterpret_cast<const float*>(block),
                       reinterpret_cast<const float*>(factor),
                       reinterpret_cast<const int32_t*>(bits),
                       reinterpret_cast<uint8_t*>(codes),
                       reinterpret_cast<uint16_t*>(meta),
                       reinterpret_cast<float*>(errors),
                       matrices,
                       n,
                       group,
                       static_cast<Clip>(clip),
                       propagate_from};
  check_range("device", device, 0, 1);
  if (device == 1) return gptq_group_cuda(args, reinterpret_cast<void*>(stream));
  check_threads(threads);
  check_widths(args.bits, matrices);
  gptq_group_cpu(args, threads);
}

void bind_descend_codes(int device, uintptr_t products, uintptr_t hessian, uintptr_t bits, uintptr_t meta,
                        uintptr_t codes, int64_t matrices, int64_t n, int group, int threads,
                        uintptr_t stream) {
  check_pointer("products", products);
  check_pointer("hessian", hessian);
  check_pointer("bits", bits);
  check_pointer("meta", meta);
  check_pointer("codes", codes);
  check_sizes(matrices, n, group);
  const CodeDescent args{reinterpret_cast<const float*>(products),
                         reinterpret_cast<const float*>(hessian),
                         reinterpret_cast<const int32_t*>(bits),
                         reinterpret_cast<const uint16_t*>(meta),
                         reinterpret_cast<uint8_t*>(codes),
                         matrices,
                         n,
                         group};
  check_range("device", device, 0, 1);
  if (device == 1) return descend_codes_cuda(args, reinterpret_cast<void*>(stream));
  check_threads(threads);
  check_widths(args.bits, matrices);
  descend_codes_cpu(args, threads);
}

}  // namespace gemq
