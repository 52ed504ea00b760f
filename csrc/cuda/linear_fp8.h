// Products of 8-bit floats (E4M3) on sm_90a: what the kernel is given.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <primitives.cuh>

namespace cuda_ops {

constexpr int kFp8Rows = 128;    // output features of a block of threads, and of a tile of scales
constexpr int kFp8Columns = 128;  // input features of a stage, and of a tile of scales

// Tokens of a block of threads, for so many tokens. Scales of tiles have room for whole ones.
constexpr int kFp8LargestTile = 128;
constexpr int fp8_tile(int64_t tokens) { return tokens <= 16 ? 16 : tokens <= 64 ? 64 : kFp8LargestTile; }

struct Fp8Params {
  const float* scales;    // blocks: [ceil(out_features / 128), chunks]; else [out_features]
  const float* x_scales;  // blocks: [chunks, scales_stride], a token's at its index; else [num_tokens]
  const void* bias;       // [out_features] or null
  void* out;              // [num_tokens, out_features]
  void* partial;          // [splits, num_tokens, padded_out] float, unused for one split
  int* arrived;           // [out tiles * token tiles], zero before and after
  int num_tokens, out_features, padded_out, num_chunks, scales_stride, splits, chunks_of_split;
  int splits_of_block;    // all of them, with the largest tile, or 1
};

// codes: [out_features, in_features], x: [num_tokens, in_features], E4M3, dense, in_features a multiple of 128.
// tile: fp8_tile(). blocks: scales are of tiles of 128 x 128, inputs' of 128 columns.
void launch_fp8_sm90(torch::headeronly::ScalarType type, int tile, bool blocks, const void* codes, const void* x,
                     int64_t in_features, const Place& place, const Fp8Params& params);

}  // namespace cuda_ops
