// Built in place of group.cu when there is no nvcc.
#include <stdexcept>

#include "gptq/group.h"

namespace gemq {

void gptq_group_cuda(const GptqGroup&, void*) {
  throw std::runtime_error(
      "gemq was built without CUDA: reinstall it where nvcc is found, or use CPU tensors");
}

}  // namespace gemq
