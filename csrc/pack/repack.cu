#include "gemq/dispatch.h"
#include "pack/launch.h"
#include "pack/repack_plan.h"

namespace gemq {

void repack_cuda(const RepackArgs& args, void* stream) {
  with_bits(args.bits, [&](auto bits) { plan_repack_codes<bits()>(args, Launch{"repack codes", stream}); });
  plan_repack_meta(args, Launch{"repack metadata", stream});
}

}  // namespace gemq
