// Keys and values as codes: what kv_codes.cpp says to its kernels, one call a run of tokens.
#pragma once

#include <stdint.h>

#include "attention.h"

namespace cpu_ops {

// Keys or values of new tokens, and where the cache has its codes and their scales.
struct Vectors {
  Type type;
  Codes codes;
  int64_t head_dim, num_heads, token_stride, head_stride;  // in values
  const void* x;
  const int64_t* slots;
  int64_t block_size, row_bytes, numbers;  // of scales: scale and offset, or scale
  char* to;                                // [num_blocks, num_heads, block_size, row_bytes]
  float* scales;                           // [num_blocks, num_heads, block_size, numbers]
};

namespace avx512 { void quantize_vectors(const Vectors&, int64_t first, int64_t last); }
namespace avx2 { void quantize_vectors(const Vectors&, int64_t first, int64_t last); }
namespace baseline { void quantize_vectors(const Vectors&, int64_t first, int64_t last); }

}  // namespace cpu_ops
