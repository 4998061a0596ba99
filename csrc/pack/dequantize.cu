#include "gemq/dispatch.h"
#include "pack/launch.h"
#include "pack/pack_body.h"

namespace gemq {

void dequantize_cuda(const DequantizeArgs& args, void* stream) {
  const Launch launch{"dequantize", stream};
  with_bits(args.bits, [&](auto bits) {
    switch (args.out_type) {
      case kFloat32:
        return plan_dequantize<bits(), Float32>(args, launch);
      case kFloat16:
        return plan_dequantize<bits(), Float16>(args, launch);
      case kBFloat16:
        return plan_dequantize<bits(), BFloat16>(args, launch);
    }
  });
}

}  // namespace gemq
