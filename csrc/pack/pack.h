// Pack, unpack, dequantize and repack one matrix. Arguments are validated by the bindings.
#pragma once

#include <cstdint>

namespace gemq {

enum OutType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// src and dst: codes uint8 [rows, k] and packed rows of row_bytes(k, bits) bytes, in either direction.
struct PackArgs {
  const uint8_t* src;
  uint8_t* dst;
  int64_t rows, k;
  int bits;
};

struct DequantizeArgs {
  const uint8_t* src;    // packed rows
  const uint16_t* meta;  // float16 pairs (s, m) [rows, k / group_size, 2]
  void* dst;             // [rows, k] of out_type
  int64_t rows, k;
  int bits, group_size;
  OutType out_type;
};

struct RepackArgs {
  const uint8_t* src_codes;
  const uint16_t* src_meta;
  uint8_t* dst_codes;
  uint16_t* dst_meta;
  int64_t n, k;
  int bits, group_size;
  int layout;    // of the tile side, gemq::Layout
  bool inverse;  // src is the tile
};

void pack_cpu(const PackArgs& args, int threads);
void unpack_cpu(const PackArgs& args, int threads);
void dequantize_cpu(const DequantizeArgs& args, int threads);
void repack_cpu(const RepackArgs& args, int threads);

// Launch on `stream` and return at once; throw std::runtime_error when CUDA refuses.
void pack_cuda(const PackArgs& args, void* stream);
void unpack_cuda(const PackArgs& args, void* stream);
void dequantize_cuda(const DequantizeArgs& args, void* stream);
void repack_cuda(const RepackArgs& args, void* stream);

}  // namespace gemq
