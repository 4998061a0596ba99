#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "moe_cpu/kernels.h"

namespace gemq {
namespace {

std::atomic<const Kernels*> chosen{nullptr};

#ifdef GEMQ_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const Kernels& best() {
#ifdef GEMQ_X86
  if (has_avx512()) return kAvx512Kernels;
  if (has_avx2()) return kAvx2Kernels;
#endif
  return kPortableKernels;
}

const Kernels& by_name(const std::string& name, const char* source) {
#ifdef GEMQ_X86
  if (name == "avx512" && has_avx512()) return kAvx512Kernels;
  if (name == "avx2" && has_avx2()) return kAvx2Kernels;
#endif
  if (name == "portable") return kPortableKernels;
  throw std::invalid_argument(std::string(source) +
                              " must be avx512, avx2 or portable and run on this CPU (best here: " +
                              best().name + "), got '" + name + "'");
}

}  // namespace

const Kernels& kernels() {
  const Kernels* current = chosen.load();
  if (current == nullptr) {
    const char* wanted = std::getenv("GEMQ_CPU_ISA");
    current = wanted != nullptr && *wanted != '\0' ? &by_name(wanted, "GEMQ_CPU_ISA") : &best();
    chosen.store(current);
  }
  return *current;
}

void set_kernels(const char* name) { chosen.store(&by_name(name, "name")); }

}  // namespace gemq
