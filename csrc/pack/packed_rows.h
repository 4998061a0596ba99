// Rows of one packed matrix as float32: an embedding's.
#pragma once

#include <cstdint>

namespace gemq {

struct PackedTable {
  const uint8_t* codes;
  const uint16_t* meta;  // float16
  int64_t k;
  int bits, group_size;
  bool tiled;  // cpu_tile, else canonical

  // out [k] = q * s + m of one row.
  void read(int64_t row, float* out) const;
};

// dst [count, k] = the rows `rows` of the table.
void read_rows(const PackedTable& table, const int64_t* rows, int64_t count, float* dst, int threads);

}  // namespace gemq
