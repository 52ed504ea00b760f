// Products with 4-bit weights: how they lie in memory. Made by engines/cuda/quantized.py once, when a model is loaded.
#pragma once

#include <cstdint>

namespace cuda_ops {

constexpr int kW4Rows = 128;   // output features of a block of threads
constexpr int kW4Columns = 64;  // input features of a stage

struct W4Params {
  const void* x;         // [num_tokens, in_features], the last dimension dense
  const uint4* codes;    // [padded_out / 16, in_features / 64, 32 lanes]: the codes of a lane as multiply_add's left factor,
                         // a word for 16 columns; of a word, bits 4 (j + 4 p) and above hold value p of register j
  const uint32_t* groups;  // [in_features / group_size, padded_out]: upper half scale, 16 bits, lower half zero
  const void* bias;      // [out_features] or null
  void* out;             // [num_tokens, out_features]
  float* partial;        // [splits, num_tokens, padded_out], unused for one split
  int* arrived;          // [out tiles * token tiles], zero before and after
  int64_t x_stride;
  int num_tokens, in_features, out_features, padded_out, group_size;
  int splits, chunks_of_split;  // of 64 columns
  bool scales_are_bf16;         // else float16
};

}  // namespace cuda_ops
