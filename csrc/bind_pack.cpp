#include "bind_pack.h"

#include "checks.h"
#include "gemq/bits.h"
#include "pack/pack.h"

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

void bind_pack(int device, uintptr_t src, uintptr_t dst, int64_t rows, int64_t k, int bits, int threads,
               uintptr_t stream) {
  if (!check_matrix(device, "rows", rows, k, bits, threads)) return;
  check_pointer("src", src);
  check_pointer("dst", dst);
  const PackArgs args{as<const uint8_t>(src), as<uint8_t>(dst), rows, k, bits};
  device == kCpu ? pack_cpu(args, threads) : pack_cuda(args, as<void>(stream));
}

void bind_unpack(int device, uintptr_t src, uintptr_t dst, int64_t rows, int64_t k, int bits, int threads,
                 uintptr_t stream) {
  if (!check_matrix(device, "rows", rows, k, bits, threads)) return;
  check_pointer("src", src);
  check_pointer("dst", dst);
  const PackArgs args{as<const uint8_t>(src), as<uint8_t>(dst), rows, k, bits};
  device == kCpu ? unpack_cpu(args, threads) : unpack_cuda(args, as<void>(stream));
}

void bind_dequantize(int device, uintptr_t src, uintptr_t meta, uintptr_t dst, int64_t rows, int64_t k,
                     int bits, int group_size, int out_dtype, int threads, uintptr_t stream) {
  const bool any = check_matrix(device, "rows", rows, k, bits, threads);
  check_groups("group_size", group_size, "k", k);
  if (out_dtype < kFloat32 || out_dtype > kBFloat16) {
    bad_value("out_dtype", out_dtype, "0 (float32), 1 (float16) or 2 (bfloat16)");
  }
  if (!any) return;
  check_pointer("src", src);
  check_pointer("meta", meta);
  check_pointer("dst", dst);
  check_multiple("meta", meta, 2);
  check_multiple("dst", dst, out_dtype == kFloat32 ? 4 : 2);
  const DequantizeArgs args{
      as<const uint8_t>(src),         as<const uint16_t>(meta), as<void>(dst), rows, k, bits, group_size,
      static_cast<OutType>(out_dtype)};
  device == kCpu ? dequantize_cpu(args, threads) : dequantize_cuda(args, as<void>(stream));
}

void bind_repack(int device, uintptr_t src_codes, uintptr_t src_meta, uintptr_t dst_codes, uintptr_t dst_meta,
                 int64_t n, int64_t k, int bits, int group_size, int layout, bool inverse, int threads,
                 uintptr_t stream) {
  const bool any = check_matrix(device, "n", n, k, bits, threads);
  check_groups("group_size", group_size, "k", k);
  if (layout != 1 && layout != 2) bad_value("layout", layout, "1 (cpu_tile) or 2 (gpu_tile)");
  if (!any) return;
  const struct {
    const char* name;
    uintptr_t pointer;
    unsigned bytes;
  } pointers[] = {{"src_codes", src_codes, device == kCuda ? 4u : 1u},
                  {"src_meta", src_meta, 2},
                  {"dst_codes", dst_codes, device == kCuda ? 4u : 1u},
                  {"dst_meta", dst_meta, 2}};
  for (const auto& p : pointers) {
    check_pointer(p.name, p.pointer);
    check_multiple(p.name, p.pointer, p.bytes);
  }
  const RepackArgs args{as<const uint8_t>(src_codes),
                        as<const uint16_t>(src_meta),
                        as<uint8_t>(dst_codes),
                        as<uint16_t>(dst_meta),
                        n,
                        k,
                        bits,
                        group_size,
                        layout,
                        inverse};
  device == kCpu ? repack_cpu(args, threads) : repack_cuda(args, as<void>(stream));
}

}  // namespace gemq
