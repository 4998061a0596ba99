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

void bind_gptq_group(const GptqCall& c) {
  check_pointer("block", c.block);
  check_pointer("factor", c.factor);
  check_pointer("bits", c.bits);
  check_pointer("codes", c.codes);
  check_pointer("meta", c.meta);
  check_pointer("errors", c.errors);
  check_sizes(c.matrices, c.n, c.group);
  check_range("clip", c.clip, 0, 2);
  const GptqGroup args{reinterpret_cast<const float*>(c.block),
                       reinterpret_cast<const float*>(c.factor),
                       reinterpret_cast<const int32_t*>(c.bits),
                       reinterpret_cast<uint8_t*>(c.codes),
                       reinterpret_cast<uint16_t*>(c.meta),
                       reinterpret_cast<float*>(c.errors),
                       c.matrices,
                       c.n,
                       c.group,
                       static_cast<Clip>(c.clip),
                       c.propagate_from};
  check_range("device", c.device, 0, 1);
  if (c.device == 1) return gptq_group_cuda(args, reinterpret_cast<void*>(c.stream));
  check_threads(c.threads);
  check_widths(args.bits, c.matrices);
  gptq_group_cpu(args, c.threads);
}

void bind_descend_codes(const DescentCall& c) {
  check_pointer("products", c.products);
  check_pointer("hessian", c.hessian);
  check_pointer("bits", c.bits);
  check_pointer("meta", c.meta);
  check_pointer("codes", c.codes);
  check_sizes(c.matrices, c.n, c.group);
  const CodeDescent args{reinterpret_cast<const float*>(c.products),
                         reinterpret_cast<const float*>(c.hessian),
                         reinterpret_cast<const int32_t*>(c.bits),
                         reinterpret_cast<const uint16_t*>(c.meta),
                         reinterpret_cast<uint8_t*>(c.codes),
                         c.matrices,
                         c.n,
                         c.group};
  check_range("device", c.device, 0, 1);
  if (c.device == 1) return descend_codes_cuda(args, reinterpret_cast<void*>(c.stream));
  check_threads(c.threads);
  check_widths(args.bits, c.matrices);
  descend_codes_cpu(args, c.threads);
}

}  // namespace gemq
