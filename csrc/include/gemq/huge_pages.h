// Memory that is read end to end, over and over.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gemq {

// Asks for pages of 2 MiB where memory that is not written yet covers whole ones. Streaming through pages of
// 4 KiB spends a quarter of the time on translating addresses. Only advice: where it is not taken, nothing
// changes.
// With `now`, pages that are written already are moved to large ones before it returns (Linux 6.1 and newer);
// memory of files stays as it is.
inline void advise_huge_pages([[maybe_unused]] void* at, [[maybe_unused]] int64_t bytes,
                              [[maybe_unused]] bool now = false) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2u << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers do not name
  const auto start = reinterpret_cast<uintptr_t>(at);
  const uintptr_t first = (start + kHuge - 1) / kHuge * kHuge, last = (start + bytes) / kHuge * kHuge;
  if (bytes <= 0 || last <= first) return;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  if (now) madvise(reinterpret_cast<void*>(first), last - first, kCollapse);
#endif
}

}  // namespace gemq
