#include "pack/packed_rows.h"

#include <cstring>
#include <initializer_list>

#include "gemq/layouts.h"
#include "gemq/parallel.h"
#include "pack/pack.h"

namespace gemq {
namespace {

constexpr int kMaxGroup = 128;
constexpr int64_t kTeamRows = 32;

// Codes of one row of a group, plane by plane: word v * 16 of a plane holds, in each field of `width` bits of
// its four bytes, the codes of four neighbouring columns.
void group_codes(const uint8_t* tile, int row, int bits, int group_size, uint8_t* codes) {
  std::memset(codes, 0, group_size);
  int first = 0;
  for (const int width : {8, 4, 2, 1}) {
    if ((bits & width) == 0) continue;
    const int fields = 8 / width;
    const uint32_t mask = 0x01010101u * ((1u << width) - 1);
    const uint8_t* plane = tile + static_cast<int64_t>(first) * group_size * kCpuRows / 8 + row * 4;
    for (int v = 0; v * 32 < group_size * width; ++v) {
      uint32_t word;
      std::memcpy(&word, plane + v * 4 * kCpuRows, 4);
      for (int f = 0; f < fields; ++f) {
        uint8_t* at = codes + v * 4 * fields + f * 4;
        uint32_t sum;
        std::memcpy(&sum, at, 4);
        sum |= (word >> (width * f) & mask) << first;
        std::memcpy(at, &sum, 4);
      }
    }
    first += width;
  }
}

}  // namespace

void PackedTable::read(int64_t row, float* out) const {
  const int64_t groups = k / group_size;
  if (!tiled) {
    const DequantizeArgs args{
        codes + row * row_bytes(k, bits), meta + row * groups * 2, out, 1, k, bits, group_size, kFloat32};
    dequantize_cpu(args, 1);
    return;
  }
  const int64_t first = row / kCpuRows * groups;
  const int inside = static_cast<int>(row % kCpuRows);
  uint8_t found[kMaxGroup];
  for (int64_t g = 0; g < groups; ++g) {
    group_codes(codes + (first + g) * group_size * kCpuRows * bits / 8, inside, bits, group_size, found);
    const uint16_t* pair = meta + (first + g) * 2 * kCpuRows + inside;
    const float s = half_to_float(pair[0]), m = half_to_float(pair[kCpuRows]);
    for (int c = 0; c < group_size; ++c) out[g * group_size + c] = dequantize_code(found[c], s, m);
  }
}

void read_rows(const PackedTable& table, const int64_t* rows, int64_t count, float* dst, int threads) {
  // waking a team takes longer than a few rows, and on busy cores milliseconds
  parallel(count < kTeamRows ? 1 : threads, [&](Team team) {
    const Range mine = team.share(count);
    for (int64_t at = mine.begin; at < mine.end; ++at) table.read(rows[at], dst + at * table.k);
  });
}

}  // namespace gemq
