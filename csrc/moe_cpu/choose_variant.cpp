#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef GEMQ_X86
#include <cpuid.h>
#endif

#include "moe_cpu/kernels.h"

namespace gemq {
namespace {

std::atomic<const Kernels*> chosen{nullptr};

#ifdef GEMQ_X86
// cpuid itself for the two names that not every compiler's __builtin_cpu_supports knows.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx2_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1u << 4)) != 0;
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

bool always() { return true; }

struct Variant {
  const Kernels& kernels;
  bool (*runs)();
};

// Best first.
const Variant kVariants[] = {
#ifdef GEMQ_X86
    {kAvx512VnniKernels, has_avx512_vnni},
    {kAvx512Kernels, has_avx512},
    {kAvx2VnniKernels, has_avx2_vnni},
    {kAvx2Kernels, has_avx2},
#endif
    {kPortableKernels, always},
};

const Kernels& best() {
  for (const Variant& variant : kVariants) {
    if (variant.runs()) return variant.kernels;
  }
  return kPortableKernels;
}

const Kernels& by_name(const std::string& name, const char* source) {
  std::string names;
  for (const Variant& variant : kVariants) {
    if (name == variant.kernels.name && variant.runs()) return variant.kernels;
    names += std::string(names.empty() ? "" : ", ") + variant.kernels.name;
  }
  throw std::invalid_argument(std::string(source) + " must be one of " + names +
                              " and run on this CPU (best here: " + best().name + "), got '" + name + "'");
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
