// One step of a parallel region, shared out so that nobody waits for a thread that the system has put aside.
#pragma once

#include <atomic>
#include <memory>
#include <thread>

#include "gemq/parallel.h"

namespace gemq {

// Items [0, items), each worked on once. A thread takes its own contiguous share, item by item, which streams
// through memory; then what is left of the others'. Unlike a barrier, wait() is for items, not for threads:
// one that comes late finds its share done.
class Phase {
public:
  Phase() = default;
  Phase(int64_t items, int threads) { reset(items, threads); }

  // For another round; nobody may be at work.
  void reset(int64_t items, int threads) {
    if (threads != threads_) {
      next_.reset(new Counter[threads]);
      threads_ = threads;
    }
    for (int i = 0; i < threads; ++i) next_[i].value.store(0, std::memory_order_relaxed);
    done_.value.store(0, std::memory_order_relaxed);
    items_ = items;
  }

  template <class F>
  void work(Team team, F&& f) {
    int64_t count = 0;
    for (int i = 0; i < team.size; ++i) {
      const int rank = (team.rank + i) % team.size;
      const Range share = Team{rank, team.size}.share(items_);
      while (true) {
        const int64_t item = share.begin + next_[rank].value.fetch_add(1, std::memory_order_relaxed);
        if (item >= share.end) break;
        f(item);
        ++count;
      }
    }
    // once: the counter's cache line goes from core to core
    if (count > 0) done_.value.fetch_add(count, std::memory_order_release);
  }

  // Wait until all items are done, by any thread.
  void wait() const {
    constexpr int kSpins = 4096;
    for (int spins = 0; done_.value.load(std::memory_order_acquire) != items_; ++spins) {
      if (spins < kSpins) {
#ifdef GEMQ_X86
        __builtin_ia32_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  int64_t items_ = 0;
  int threads_ = 0;
  std::unique_ptr<Counter[]> next_;
  Counter done_;
};

}  // namespace gemq
