// Products with weights that lie in the order of the tensor cores: how they lie, and what the kernel is given. The
// weights are made by engines/cuda/quantized.py once, when a model is loaded.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <primitives.cuh>

namespace cuda_ops {

constexpr int kProductRows = 128;  // output features of a block of threads; weights are padded to a multiple of it
constexpr int kChunkBytes = 128;   // of a row of inputs, in a stage: 64 values of 16 bits, 128 of 8

// A lane's codes are those that multiply_add wants of it as left factor, 16 rows and 32 bytes of inputs at a time:
// 16 bytes of values as they are; or two words of 8-bit floats, of which bits 8 (j % 2 + 2 p) and above of word j / 2 hold
// value p of register j; or a word of 4-bit values, of which bits 4 (j + 4 p) and above hold that.
struct ProductParams {
  const void* x;            // [rows, in_features], the last dimension dense
  const uint4* codes;       // [experts, padded_out / 16, chunks, pieces, 32 lanes]; pieces: 4; 2 of fp8; 1 of 4 bits
  const void* scales;       // w4: [experts, groups, padded_out] uint32, upper half scale, 16 bits, lower half zero;
                            // fp8: [experts, groups, padded_out] float;
                            // mxfp4: [experts, 2 * chunks, padded_out] uint8 exponents; int8: [experts, padded_out] float
  const float* x_scales;    // int8: [rows]
  const void* bias;         // [experts, out_features] or null
  void* out;                // [num_tokens, out_features]
  void* partial;            // [splits, num_tokens, padded_out] of 32 bits, unused for one split
  int* arrived;             // [out tiles * token tiles], zero before and after; unused for one split
  // Of experts, else null: tile t of tokens has the expert tile_experts[t], -1 for none, and the slots t * TOKENS and
  // following of `slots`, -1 for none. Slot s is row s / slots_of_row of x and row s of out.
  const int* slots;
  const int* tile_experts;
  int64_t x_stride;
  int num_tokens, in_features, out_features, padded_out, num_chunks;
  int group_size;               // w4, fp8
  int scale_rows;               // of an expert: groups, or 2 * chunks
  int splits, chunks_of_split;  // of the columns
  int splits_of_block;          // all of them, or 1
  int slots_of_row;
  bool scales_are_bf16;         // w4; else float16
};

// Tokens of a tile for so many tokens: the least that holds them, else the largest.
template <int... TILES> constexpr int product_tile(int64_t tokens) {
  int tile = 0;
  ((tile = tile && tokens <= tile ? tile : TILES), ...);
  return tile;
}

// A launch of each format, with tiles of so many tokens: 16, 32 or 64 of w4, 16 or 64 of fp8 and mxfp4, 16, 64 or 128 else.
using ScalarType = torch::headeronly::ScalarType;
void launch_product_w4(ScalarType type, int tile, int tiles, const Place& place, const ProductParams& params);
void launch_product_w4_sm90(ScalarType type, int tile, int tiles, const Place& place, const ProductParams& params);
void launch_product_fp8(ScalarType type, int tile, int tiles, const Place& place, const ProductParams& params);
void launch_product_mxfp4(ScalarType type, int tile, int tiles, const Place& place, const ProductParams& params);
void launch_product_dense(ScalarType type, int tile, int tiles, const Place& place, const ProductParams& params);
void launch_product_int8(ScalarType type, int tile, int tiles, const Place& place, const ProductParams& params);

}  // namespace cuda_ops
