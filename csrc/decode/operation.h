// One operation of a decode step. All threads run the operations in order; the items of an operation's phases
// are shared out among them, and the next operation starts when the last phase's items are done.
#pragma once

#include "decode/row_buffers.h"
#include "gemq/parallel.h"
#include "gemq/phase.h"

namespace gemq {

// What is new in each step.
struct StepInput {
  const int64_t* tokens;     // [batch]
  const int64_t* positions;  // [batch], in each row's own text
  const int64_t* starts;     // [batch]: cache slots before it are padding
  int64_t slot;              // where the new tokens go in the cache
};

class Operation {
public:
  virtual ~Operation() = default;
  virtual const char* name() const = 0;
  // Before every step, on one thread.
  virtual void reset(const StepInput& step, int threads) = 0;
  // Every thread's part, with this thread's scratch; returns without waiting for the last phase.
  virtual void run(const StepInput& step, Team team, float* scratch) = 0;
  // Asks for the memory that this thread will read first.
  virtual void fetch(Team) const {}
  virtual int64_t scratch_floats() const { return 0; }

  void wait() const { last_.wait(); }

protected:
  Phase last_;
};

}  // namespace gemq
