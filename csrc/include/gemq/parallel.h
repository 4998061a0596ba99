// CPU threads: OpenMP where the compiler has it, otherwise the calling thread alone.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace gemq {

struct Range {
  int64_t begin, end;
};

// One thread's view of a parallel region.
struct Team {
  int rank, size;

  // The rank's share of [0, count): contiguous, so that each thread streams through memory.
  Range share(int64_t count) const { return {count * rank / size, count * (rank + 1) / size}; }
};

// Whether this process may start a team. A child made by fork() has none of its parent's threads, yet GNU's
// OpenMP would wait for them for ever; it works alone, with the same results.
bool may_start_team();

// Runs body(team) on up to `threads` threads. The body must not throw.
template <class F>
void parallel([[maybe_unused]] int threads, F&& body) {
#ifdef _OPENMP
  if (threads > 1 && may_start_team()) {
#pragma omp parallel num_threads(threads)
    body(Team{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  body(Team{0, 1});
}

}  // namespace gemq
