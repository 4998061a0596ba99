// Built in place of group.cu and descent.cu when there is no nvcc.
#include <stdexcept>

#include "gptq/descent.h"
#include "gptq/group.h"

namespace gemq {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error(
      "gemq was built without CUDA: reinstall it where nvcc is found, or use CPU tensors");
}

}  // namespace

void gptq_group_cuda(const GptqGroup&, void*) { refuse(); }

void descend_codes_cuda(const CodeDescent&, void*) { refuse(); }

}  // namespace gemq
