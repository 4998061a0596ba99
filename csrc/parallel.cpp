#include "gemq/parallel.h"

#include <pthread.h>

namespace gemq {
namespace {

bool forked = false;
// Registered when the extension is loaded: torch may start the runtime's threads before the first op here
// does.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool may_start_team() { return !forked; }

}  // namespace gemq
