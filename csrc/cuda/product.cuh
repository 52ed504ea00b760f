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
  static constexpr int kStages = Format::kPieces > 2 ? (TOKENS <= 16 ? 5 : 3) : TOKENS <= 32 || Format::kPieces == 1 ? 6 : 5;
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

// What a thread copies: the same pieces of every chunk, so that a chunk costs it additions and no more.
template <class Format, int TOKENS> struct ChunkCopies {
  using Shape = ProductShape<Format, TOKENS>;
  static constexpr int kOfTile = Format::kPieces * 32;  // pieces of 16 bytes
  static constexpr int kCodes = Shape::kCodeBytes / 16 / Shape::kThreads, kInputs = TOKENS * 8 / Shape::kThreads;
  static_assert(Shape::kThreads % kOfTile == 0 && kCodes * Shape::kThreads * 16 == Shape::kCodeBytes);
  static_assert(kInputs * Shape::kThreads == TOKENS * 8 && Shape::kThreads / 8 % 8 == 0);

  // rows: of x, -1 for none; in shared memory. chunk: the first.
  __device__ __forceinline__ ChunkCopies(const ProductParams& p, const int* rows, int expert, int row_tile, int chunk) {
    const int thread = threadIdx.x, token = thread / 8;
    const int64_t tile = (static_cast<int64_t>(expert) * p.padded_out + row_tile * kProductRows) / 16 + thread / kOfTile;
    codes = p.codes + (tile * p.num_chunks + chunk) * kOfTile + thread % kOfTile;
    code_step = static_cast<int64_t>(Shape::kThreads / kOfTile) * p.num_chunks * kOfTile;
    codes_to = keep(thread * 16);
    inputs_to = keep(Shape::kCodeBytes + input_offset(token, thread % 8));
    column = chunk * kChunkBytes + thread % 8 * 16;
    row_bytes = p.in_features * Format::kValueBytes;
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      const int row = rows[token + i * (Shape::kThreads / 8)];
      has_row[i] = row >= 0;
      inputs[i] = static_cast<const unsigned char*>(p.x) + (has_row[i] ? row * p.x_stride * Format::kValueBytes : 0);
    }
    if constexpr (Format::kScaled) scales = Format::scale_copies(p, expert, row_tile * kProductRows, chunk);
  }

  // Starts the copies of the next chunk.
  __device__ __forceinline__ void next(unsigned char* stage) {
    const uint4* from = codes;
#pragma unroll
    for (int i = 0; i < kCodes; ++i, from += code_step)
      copy_async(stage + codes_to + i * Shape::kThreads * 16, from, true);
    codes += kOfTile;
#pragma unroll
    for (int i = 0; i < kInputs; ++i)
      copy_async(stage + inputs_to + i * (Shape::kThreads / 8) * kChunkBytes, inputs[i] + column,
                 has_row[i] && column < row_bytes);
    column += kChunkBytes;
    if constexpr (Format::kScaled) scales.next(stage + Shape::kCodeBytes + Shape::kInputBytes);
  }

  const uint4* codes;
  int64_t code_step;
  const unsigned char* inputs[kInputs];
  bool has_row[kInputs];
  int codes_to, inputs_to, column, row_bytes;
  ScaleCopies scales;
};

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
  ChunkCopies<Format, TOKENS> copies(p, rows, expert, row_tile, begin);
  int filled = 0;  // stage that is filled next
  const auto start_copy = [&](int chunk) {
    if (chunk < end) copies.next(memory + filled * Shape::kStageBytes);
    copy_commit();
    filled = filled + 1 == Shape::kStages ? 0 : filled + 1;
  };
#pragma unroll
  for (int i = 0; i < Shape::kStages - 1; ++i) start_copy(begin + i);
  Sum part[Format::kScaled ? kTiles : 1][kColumns][4] = {};
  const int chunks_of_group = p.group_size > 64 ? p.group_size / 64 : 1;
  int left = chunks_of_group - begin % chunks_of_group;  // chunks of the group
  // What a warp reads of a stage begins here.
  const int codes_at = keep((first_tile * Format::kPieces * 32 + lane) * 16);
  const int scales_at = keep(Shape::kCodeBytes + Shape::kInputBytes + (first_tile * 16 + lane / 4) * Format::kRowBytes);
  const int inputs_at[2] = {keep(Shape::kCodeBytes + input_offset(first_column * 8 + lane % 8, lane / 8)),
                            keep(Shape::kCodeBytes + input_offset(first_column * 8 + lane % 8, 4 + lane / 8))};
  for (int chunk = begin, current = 0; chunk < end; ++chunk) {
    copy_wait<Shape::kStages - 2>();
    __syncthreads();  // all threads' copies have landed, and all have read the stage that is filled next
    start_copy(chunk + Shape::kStages - 1);
    const unsigned char* stage = memory + current * Shape::kStageBytes;
    current = current + 1 == Shape::kStages ? 0 : current + 1;
    const typename Format::Codes codes[kTiles] = {{stage + codes_at}, {stage + codes_at + Format::kPieces * 512}};
    typename Format::Row row[kTiles];
    bool last = true;  // of a group, or of this block's columns
    if constexpr (!Format::kShort) {
      last = --left == 0 || chunk + 1 == end;
      if (left == 0) left = chunks_of_group;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 0 || Format::two_groups(p))
#pragma unroll
        for (int i = 0; i < kTiles; ++i) row[i].load(stage + scales_at + half * Format::kHalfBytes, i * 16);
      uint32_t inputs_of[kColumns][4];
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        load_matrices(inputs_of[n], stage + inputs_at[half] + n * 8 * kChunkBytes);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          uint32_t weights[4];
          codes[i].fragment(weights, half * 2 + step, row[i]);
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
            Sum(&to)[4] = Format::kScaled ? part[Format::kScaled ? i : 0][n] : sums[i][n];
            Format::multiply(to, weights, inputs_of[n][2 * step], inputs_of[n][2 * step + 1]);
          }
        }
      }
      if constexpr (Format::kScaled) {
        if (half == 0 ? !Format::two_groups(p) : !last) continue;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          float scale[2];
          row[i].scales(scale, p);
#pragma unroll
          for (int n = 0; n < kColumns; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              sums[i][n][j] += scale[j / 2] * part[i][n][j];
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
