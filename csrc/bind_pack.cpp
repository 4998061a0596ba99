#include "bind_pack.h"

#include "checks.h"
#include "gemq/bits.h"
#include "pack/pack.h"
#include "pack/packed_rows.h"

namespace gemq {
namespace {

enum Device { kCpu = 0, kCuda = 1 };

template <class T>
T* as(uintptr_t pointer) {
  return reinterpret_cast<T*>(pointer);
}

// Checks what all four share; false if there is nothing to do (empty tensors have null addresses).
bool check_matrix(int device, const char* rows_name, int64_t rows, int64_t k, int bits, int threads) {
  if (device != kCpu && device != kCuda) bad_value("device", device, "0 (CPU) or 1 (CUDA)");
  check_range("bits", bits, 1, kMaxBits);
  check_at_least(rows_name, rows, 0);
  check_at_least("k", k, 1);
  if (device == kCpu) check_threads(threads);
  return rows > 0;
}

}  // namespace

void bind_pack(const PackCall& c) {
  if (!check_matrix(c.device, "rows", c.rows, c.k, c.bits, c.threads)) return;
  check_pointer("src", c.src);
  check_pointer("dst", c.dst);
  const PackArgs args{as<const uint8_t>(c.src), as<uint8_t>(c.dst), c.rows, c.k, c.bits};
  c.device == kCpu ? pack_cpu(args, c.threads) : pack_cuda(args, as<void>(c.stream));
}

void bind_unpack(const PackCall& c) {
  if (!check_matrix(c.device, "rows", c.rows, c.k, c.bits, c.threads)) return;
  check_pointer("src", c.src);
  check_pointer("dst", c.dst);
  const PackArgs args{as<const uint8_t>(c.src), as<uint8_t>(c.dst), c.rows, c.k, c.bits};
  c.device == kCpu ? unpack_cpu(args, c.threads) : unpack_cuda(args, as<void>(c.stream));
}

void bind_dequantize(const DequantizeCall& c) {
  const bool any = check_matrix(c.device, "rows", c.rows, c.k, c.bits, c.threads);
  check_groups("group_size", c.group_size, "k", c.k);
  if (c.out_dtype < kFloat32 || c.out_dtype > kBFloat16) {
    bad_value("out_dtype", c.out_dtype, "0 (float32), 1 (float16) or 2 (bfloat16)");
  }
  if (!any) return;
  check_pointer("src", c.src);
  check_pointer("meta", c.meta);
  check_pointer("dst", c.dst);
  check_multiple("meta", c.meta, 2);
  check_multiple("dst", c.dst, c.out_dtype == kFloat32 ? 4 : 2);
  const DequantizeArgs args{as<const uint8_t>(c.src),
                            as<const uint16_t>(c.meta),
                            as<void>(c.dst),
                            c.rows,
                            c.k,
                            c.bits,
                            c.group_size,
                            static_cast<OutType>(c.out_dtype)};
  c.device == kCpu ? dequantize_cpu(args, c.threads) : dequantize_cuda(args, as<void>(c.stream));
}

void bind_repack(const RepackCall& c) {
  const bool any = check_matrix(c.device, "n", c.n, c.k, c.bits, c.threads);
  check_groups("group_size", c.group_size, "k", c.k);
  if (c.layout != 1 && c.layout != 2) bad_value("layout", c.layout, "1 (cpu_tile) or 2 (gpu_tile)");
  if (!any) return;
  const struct {
    const char* name;
    uintptr_t pointer;
    unsigned bytes;
  } pointers[] = {{"src_codes", c.src_codes, c.device == kCuda ? 4u : 1u},
                  {"src_meta", c.src_meta, 2},
                  {"dst_codes", c.dst_codes, c.device == kCuda ? 4u : 1u},
                  {"dst_meta", c.dst_meta, 2}};
  for (const auto& p : pointers) {
    check_pointer(p.name, p.pointer);
    check_multiple(p.name, p.pointer, p.bytes);
  }
  const RepackArgs args{as<const uint8_t>(c.src_codes),
                        as<const uint16_t>(c.src_meta),
                        as<uint8_t>(c.dst_codes),
                        as<uint16_t>(c.dst_meta),
                        c.n,
                        c.k,
                        c.bits,
                        c.group_size,
                        c.layout,
                        c.inverse};
  c.device == kCpu ? repack_cpu(args, c.threads) : repack_cuda(args, as<void>(c.stream));
}

void bind_read_rows(const RowsCall& c) {
  check_range("bits", c.bits, 1, kMaxBits);
  check_at_least("n", c.n, 1);
  check_at_least("count", c.count, 0);
  check_groups("group_size", c.group_size, "k", c.k);
  check_threads(c.threads);
  if (c.count == 0) return;
  check_pointer("codes", c.codes);
  check_pointer("meta", c.meta);
  check_pointer("rows", c.rows);
  check_pointer("dst", c.dst);
  check_multiple("meta", c.meta, 2);
  check_multiple("rows", c.rows, 8);
  check_multiple("dst", c.dst, 4);
  const auto* rows = as<const int64_t>(c.rows);
  for (int64_t i = 0; i < c.count; ++i) check_range("rows", rows[i], 0, c.n - 1);
  const PackedTable table{
      as<const uint8_t>(c.codes), as<const uint16_t>(c.meta), c.k, c.bits, c.group_size, c.tiled};
  read_rows(table, rows, c.count, as<float>(c.dst), c.threads);
}

}  // namespace gemq
