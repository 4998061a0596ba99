#include "decode/program.h"

#include <algorithm>
#include <chrono>

namespace gemq {

int Program::buffer(int64_t width, float* external) {
  rows_.push_back(std::make_unique<Rows>(kernels_, precision_, batch_, width, external));
  return static_cast<int>(rows_.size()) - 1;
}

void Program::run(const StepInput& step, int threads) {
  int64_t own = 0;
  for (const auto& operation : operations_) {
    operation->reset(step, threads);
    own = std::max(own, operation->scratch_floats());
  }
  own = (own + 15) / 16 * 16;
  if (own * threads > scratch_held_) {
    scratch_ = AlignedFloats(own * threads);
    scratch_held_ = own * threads;
  }
  parallel(threads, [&](Team team) {
    using Clock = std::chrono::steady_clock;
    const bool measuring = measured_ && team.rank == 0;
    Clock::time_point before = measuring ? Clock::now() : Clock::time_point();
    for (size_t i = 0; i < operations_.size(); ++i) {
      operations_[i]->run(step, team, scratch_.get() + own * team.rank);
      if (i + 1 < operations_.size()) operations_[i + 1]->fetch(team);
      operations_[i]->wait();
      if (!measuring) continue;
      const Clock::time_point now = Clock::now();
      seconds_[i] += std::chrono::duration<double>(now - before).count();
      before = now;
    }
  });
}

void Program::measure(bool on) {
  measured_ = on;
  seconds_.assign(operations_.size(), 0.0);
}

std::vector<std::pair<std::string, double>> Program::seconds() const {
  std::vector<std::pair<std::string, double>> found;
  for (size_t i = 0; i < seconds_.size(); ++i) found.emplace_back(operations_[i]->name(), seconds_[i]);
  return found;
}

}  // namespace gemq
