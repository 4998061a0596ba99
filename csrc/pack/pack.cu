#include "gemq/dispatch.h"
#include "pack/launch.h"
#include "pack/pack_body.h"

namespace gemq {

void pack_cuda(const PackArgs& args, void* stream) {
  with_bits(args.bits, [&](auto bits) { plan_pack<bits()>(args, Launch{"pack", stream}); });
}

void unpack_cuda(const PackArgs& args, void* stream) {
  with_bits(args.bits, [&](auto bits) { plan_unpack<bits()>(args, Launch{"unpack", stream}); });
}

}  // namespace gemq
