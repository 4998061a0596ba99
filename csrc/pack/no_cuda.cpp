// Built in place of the .cu files when there is no nvcc.
#include <stdexcept>

#include "pack/pack.h"

namespace gemq {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error(
      "gemq was built without CUDA: reinstall it where nvcc is found, or use CPU tensors");
}

}  // namespace

void pack_cuda(const PackArgs&, void*) { refuse(); }
void unpack_cuda(const PackArgs&, void*) { refuse(); }
void dequantize_cuda(const DequantizeArgs&, void*) { refuse(); }
void repack_cuda(const RepackArgs&, void*) { refuse(); }

}  // namespace gemq
