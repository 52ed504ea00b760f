// x @ weight.T. After Marlin (arXiv 2408.11743): weights are stored in the order in which the tensor cores want them and
// stream through a pipeline of asynchronous copies. Here they are the left factor, so that 8 tokens are a tile.
#pragma once

#include "product_formats.cuh"
#include "splits.cuh"

namespace cuda_ops {

template <class Format, int TOKENS> struct ProductShape {
  static constexpr int kTokenWarps = TOKENS > 64 ? 2 : 1;
  static constexpr int kRowWarps = 4, kTilesOfWarp = 2;  // of 16 rows
  static constexpr int kThreads = kTokenWarps * kRowWarps * 32;
  static constexpr int kCodeBytes = kProductRows / 16 * Format::kPieces * 512;
  static constexpr int kInputBytes = TOKENS * kChunkBytes;
  static constexpr int kStageBytes = kCodeBytes + kInputBytes + Format::kScaleBytes;
  // At most 96 KiB, so that devices with the least shared memory (sm_86) can run it.
  static constexpr int kStages = Format::kPieces <= 2 ? (TOKENS <= 32 ? 6 : 4) : (TOKENS <= 16 ? 5 : 3);
  static constexpr int kOutStride = kProductRows + 4;
  static constexpr int kPipelineBytes =
      kStages * kStageBytes > TOKENS * kOutStride * 4 ? kStages * kStageBytes : TOKENS * kOutStride * 4;
  static constexpr int kSharedBytes = kPipelineBytes + TOKENS * 4 + 16;  // besides: rows of x, is_last
};

// Rows of inputs have eight pieces of 16 bytes; which place a piece has depends on the row, so that eight rows' pieces of
// one column are in different banks.
__device__ __forceinline__ int input_offset(int token, int piece) {
  return token * kChunkBytes + ((piece ^ (token & 7)) << 4);
}

// rows: of x, -1 for none; in shared memory.
template <class Format, int TOKENS>
__device__ __forceinline__ void copy_stage(unsigned char* stage, const ProductParams& p, const int* rows, int expert,
                                           int row_tile, int chunk) {
  using Shape = ProductShape<Format, TOKENS>;
  constexpr int kOfTile = Format::kPieces * 32, kValueBytes = Format::kValueBytes;
  const int thread = threadIdx.x;
  const int64_t tile = (static_cast<int64_t>(expert) * p.padded_out + row_tile * kProductRows) / 16;
#pragma unroll
  for (int piece = thread; piece < Shape::kCodeBytes / 16; piece += Shape::kThreads) {
    const int64_t from = ((tile + piece / kOfTile) * p.num_chunks + chunk) * kOfTile + piece % kOfTile;
    copy_async(stage + piece * 16, p.codes + from, true);
  }
  unsigned char* inputs = stage + Shape::kCodeBytes;
#pragma unroll
  for (int piece = thread; piece < TOKENS * 8; piece += Shape::kThreads) {
    const int token = piece / 8, row = rows[token];
    const int64_t column = (static_cast<int64_t>(chunk) * kChunkBytes + piece % 8 * 16) / kValueBytes;
    const bool valid = row >= 0 && column < p.in_features;
    const int64_t from = valid ? (row * p.x_stride + column) * kValueBytes : 0;
    copy_async(inputs + input_offset(token, piece % 8), static_cast<const unsigned char*>(p.x) + from, valid);
  }
  Format::copy_scales(inputs + Shape::kInputBytes, p, expert, row_tile * kProductRows, chunk);
}

// Grid: (token tiles, row tiles, splits). Threads: for each 64 tokens 4 warps with 32 output features each. Shared memory:
// ProductShape. Moves the weights once for each tile of tokens, and the inputs once for each row tile, out of the
// second-level cache. Splits of the columns depend on the weight's shape and the device alone, so a token's bits do not
// depend on the batch.
template <class Format, int TOKENS>
__global__ void __launch_bounds__(ProductShape<Format, TOKENS>::kThreads) product_kernel(ProductParams p) {
  using Shape = ProductShape<Format, TOKENS>;
  using Sum = typename Format::Sum;
  using T = typename Format::T;
  constexpr int kTiles = Shape::kTilesOfWarp, kColumns = TOKENS / 8 / Shape::kTokenWarps;
  const int expert = p.slots ? p.tile_experts[blockIdx.x] : 0;
  if (expert < 0) return;
  unsigned char* memory = shared_memory();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_tile = warp % Shape::kRowWarps * kTiles, first_column = warp / Shape::kRowWarps * kColumns;
  const int first_token = blockIdx.x * TOKENS, row_tile = blockIdx.y, split = blockIdx.z;
  const int begin = split * p.chunks_of_split, end = min(begin + p.chunks_of_split, p.num_chunks);
  int* rows = reinterpret_cast<int*>(memory + Shape::kPipelineBytes);
  for (int i = threadIdx.x; i < TOKENS; i += Shape::kThreads) {
    const int slot = p.slots ? p.slots[first_token + i] : first_token + i;
    rows[i] = p.slots ? (slot < 0 ? -1 : slot / p.slots_of_row) : (slot < p.num_tokens ? slot : -1);
  }
  __syncthreads();

  Sum sums[kTiles][kColumns][4] = {};
  const auto start_copy = [&](int chunk) {
    if (chunk < end)
      copy_stage<Format, TOKENS>(memory + chunk % Shape::kStages * Shape::kStageBytes, p, rows, expert, row_tile, chunk);
    copy_commit();
  };
#pragma unroll
  for (int i = 0; i < Shape::kStages - 1; ++i) start_copy(begin + i);
  Sum part[Format::kScaled ? kTiles : 1][kColumns][4] = {};
  for (int chunk = begin; chunk < end; ++chunk) {
    copy_wait<Shape::kStages - 2>();
    __syncthreads();  // all threads' copies have landed, and all have read the stage that is filled next
    start_copy(chunk + Shape::kStages - 1);
    const unsigned char* stage = memory + chunk % Shape::kStages * Shape::kStageBytes;
    const unsigned char* inputs = stage + Shape::kCodeBytes;
    const unsigned char* scales = inputs + Shape::kInputBytes;
    const typename Format::Codes codes[kTiles] = {{stage, first_tile, lane}, {stage, first_tile + 1, lane}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned char* group = scales;
      if constexpr (Format::kScaled) group = Format::group(scales, p, half, first_tile * 16 + lane / 4);
      uint32_t inputs_of[kColumns][4];
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        load_matrices(inputs_of[n], inputs + input_offset((first_column + n) * 8 + lane % 8, half * 4 + lane / 8));
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const typename Format::Row row(group, i * 16);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          uint32_t weights[4];
          codes[i].fragment(weights, half * 2 + step, row);
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
            Sum(&to)[4] = Format::kScaled ? part[Format::kScaled ? i : 0][n] : sums[i][n];
            Format::multiply(to, weights, inputs_of[n][2 * step], inputs_of[n][2 * step + 1]);
          }
        }
      }
      if constexpr (Format::kScaled) {
        // At the end of a group, and of this block's columns.
        if (!Format::ends(p, chunk * 64 + (half + 1) * 32) && !(half == 1 && chunk + 1 == end)) continue;
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float scale = Format::scale(group, i * 16 + j / 2 * 8, p);
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
              sums[i][n][j] += scale * part[i][n][j];
              part[i][n][j] = 0.0f;
            }
          }
      }
    }
  }
  __syncthreads();

  Sum* tile = reinterpret_cast<Sum*>(memory);  // [TOKENS, kOutStride], in place of the stages
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        tile[((first_column + n) * 8 + lane % 4 * 2 + j % 2) * Shape::kOutStride + (first_tile + i) * 16 + lane / 4 +
             j / 2 * 8] = sums[i][n][j];
  __syncthreads();
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + static_cast<int64_t>(expert) * p.out_features : nullptr;
  const SplitSums own{p.partial,
                      p.splits > 1 ? p.arrived + blockIdx.y * gridDim.x + blockIdx.x : nullptr,
                      p.splits, split, p.num_tokens, p.padded_out, p.out_features, first_token,
                      p.slots ? TOKENS : min(TOKENS, p.num_tokens - first_token), row_tile * kProductRows};
  store_sums(own, tile, Shape::kOutStride, rows + TOKENS, static_cast<int>(threadIdx.x), Shape::kThreads,
             [] { __syncthreads(); },
             [&](int token, int row, Sum sum) {
               const int at = p.slots ? p.slots[first_token + token] : first_token + token;
               if (at < 0) return;
               float value = static_cast<float>(sum);
               if constexpr (__is_same(Sum, int))
                 value = multiply(multiply(value, p.x_scales[rows[token]]),
                                  static_cast<const float*>(p.scales)[expert * p.padded_out + row]);
               if (bias) value = add(value, to_float(bias[row]));
               static_cast<T*>(p.out)[static_cast<int64_t>(at) * p.out_features + row] = from_float<T>(value);
             });
}

}  // namespace cuda_ops
