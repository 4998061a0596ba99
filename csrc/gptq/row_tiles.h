// Rows of many matrices, shared out to threads in tiles.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemq/layouts.h"
#include "gemq/parallel.h"

namespace gemq {

// Calls body(matrix, first row of all matrices' rows, rows) for tiles of up to 16 rows of one matrix.
template <class Body>
void over_row_tiles(int64_t matrices, int64_t n, int threads, Body&& body) {
  constexpr int64_t kRows = kCpuRows;
  const int64_t tiles = (n + kRows - 1) / kRows;
  parallel(threads, [&](const Team& team) {
    const Range jobs = team.share(matrices * tiles);
    for (int64_t job = jobs.begin; job < jobs.end; ++job) {
      const int64_t matrix = job / tiles, first = job % tiles * kRows;
      body(matrix, matrix * n + first, static_cast<int>(std::min(kRows, n - first)));
    }
  });
}

}  // namespace gemq
