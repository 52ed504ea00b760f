// x @ weight.T for 4-bit weights with a scale and a zero for each group of columns (AWQ, GPTQ). After Marlin (arXiv
// 2408.11743): codes are stored in the order in which the tensor cores want them and stream through a pipeline of
// asynchronous copies. Here the weights are the left factor, so that 8 tokens are a tile; code - zero is exact in T, and
// the scale multiplies a group's sum in float32: no weight is rounded.
#pragma once

#include <primitives.cuh>

#include "linear_w4a16.h"

namespace cuda_ops {

template <int TOKENS> struct W4Shape {
  static constexpr int kWarps = 4, kTilesOfWarp = 2;  // of 16 rows
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStages = TOKENS <= 32 ? 6 : 4;
  static constexpr int kStride = kW4Columns + 8;
  static constexpr int kCodeBytes = kW4Rows * kW4Columns / 2;
  static constexpr int kInputBytes = TOKENS * kStride * 2;
  static constexpr int kGroupBytes = 2 * kW4Rows * 4;
  static constexpr int kStageBytes = kCodeBytes + kInputBytes + kGroupBytes;
  static constexpr int kOutStride = kW4Rows + 4;
  static constexpr int kSharedBytes =
      (kStages * kStageBytes > TOKENS * kOutStride * 4 ? kStages * kStageBytes : TOKENS * kOutStride * 4) + 16;
};

// T(2^m + code), exactly, from a code in its lowest bits: 128 for bfloat16, 1024 for float16.
template <class T> struct Magic;
template <> struct Magic<bf16> { static constexpr uint32_t kPair = 0x43004300; };
template <> struct Magic<fp16> { static constexpr uint32_t kPair = 0x64006400; };

__device__ __forceinline__ float scale_of(uint32_t group, bool is_bf16) {
  return is_bf16 ? bits_float(group & 0xFFFF0000u) : half_bits_to_float(static_cast<uint16_t>(group >> 16));
}

template <class T, int TOKENS>
__device__ __forceinline__ void copy_stage(unsigned char* stage, const W4Params& p, int row_tile, int first_token,
                                           int chunk) {
  using Shape = W4Shape<TOKENS>;
  const int thread = threadIdx.x, lane = thread % 32;
#pragma unroll
  for (int i = 0; i < Shape::kTilesOfWarp; ++i) {
    const int tile = thread / 32 * Shape::kTilesOfWarp + i;
    const int64_t from = (static_cast<int64_t>(row_tile) * (kW4Rows / 16) + tile) * (p.in_features / kW4Columns) + chunk;
    copy_async(stage + (tile * 32 + lane) * 16, p.codes + from * 32 + lane, true);
  }
  unsigned char* inputs = stage + Shape::kCodeBytes;
#pragma unroll
  for (int piece = thread; piece < TOKENS * 8; piece += Shape::kThreads) {
    const int token = piece / 8, column = piece % 8 * 8;
    const bool valid = first_token + token < p.num_tokens;
    const int64_t from = (valid ? first_token + token : 0) * p.x_stride + chunk * kW4Columns + column;
    copy_async(inputs + (token * Shape::kStride + column) * 2, static_cast<const T*>(p.x) + from, valid);
  }
  unsigned char* groups = inputs + Shape::kInputBytes;
  const int halves = p.group_size == 32 ? 2 : 1;
  if (thread < halves * (kW4Rows / 4)) {
    const int half = thread / (kW4Rows / 4), row = thread % (kW4Rows / 4) * 4;
    const int64_t group = (chunk * kW4Columns + half * 32) / p.group_size;
    copy_async(groups + (half * kW4Rows + row) * 4, p.groups + group * p.padded_out + row_tile * kW4Rows + row, true);
  }
}

// Grid: (token tiles, row tiles, splits). Threads: 4 warps with 32 output features each. Shared memory: W4Shape. Moves
// half a byte a weight, 4 bytes a group, and the inputs once for each row tile, out of the second-level cache. Splits of
// the columns depend on the weight's shape and the device alone, so a token's bits do not depend on the batch.
template <class T, int TOKENS>
__global__ void __launch_bounds__(W4Shape<TOKENS>::kThreads) w4a16_kernel(W4Params p) {
  using Shape = W4Shape<TOKENS>;
  constexpr int kTiles = Shape::kTilesOfWarp, kColumns = TOKENS / 8;
  unsigned char* memory = shared_memory();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_token = blockIdx.x * TOKENS, row_tile = blockIdx.y, split = blockIdx.z;
  const int begin = split * p.chunks_of_split;
  const int end = min(begin + p.chunks_of_split, p.in_features / kW4Columns);

  float sums[kTiles][kColumns][4] = {}, part[kTiles][kColumns][4] = {};
  const auto start_copy = [&](int chunk) {
    if (chunk < end)
      copy_stage<T, TOKENS>(memory + chunk % Shape::kStages * Shape::kStageBytes, p, row_tile, first_token, chunk);
    copy_commit();
  };
#pragma unroll
  for (int i = 0; i < Shape::kStages - 1; ++i) start_copy(begin + i);
  for (int chunk = begin; chunk < end; ++chunk) {
    copy_wait<Shape::kStages - 2>();
    __syncthreads();  // all threads' copies have landed, and all have read the stage that is filled next
    start_copy(chunk + Shape::kStages - 1);
    const unsigned char* stage = memory + chunk % Shape::kStages * Shape::kStageBytes;
    const T* inputs = reinterpret_cast<const T*>(stage + Shape::kCodeBytes);
    const uint32_t* groups = reinterpret_cast<const uint32_t*>(stage + Shape::kCodeBytes + Shape::kInputBytes);
    uint4 codes[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      codes[i] = *reinterpret_cast<const uint4*>(stage + ((warp * kTiles + i) * 32 + lane) * 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t* group = groups + (p.group_size == 32 ? half * kW4Rows : 0) + warp * kTiles * 16 + lane / 4;
      uint32_t inputs_of[kColumns][4];
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        load_matrices(inputs_of[n], inputs + (n * 8 + lane % 8) * Shape::kStride + half * 32 + lane / 8 * 8);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const uint32_t zeros[2] = {Magic<T>::kPair | (group[i * 16] & 0xFF) * 0x00010001u,
                                   Magic<T>::kPair | (group[i * 16 + 8] & 0xFF) * 0x00010001u};
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const uint32_t word = half ? (step ? codes[i].w : codes[i].z) : (step ? codes[i].y : codes[i].x);
          uint32_t weights[4];
#pragma unroll
          for (int j = 0; j < 4; ++j)
            weights[j] = subtract_pairs<T>((word >> (4 * j) & 0x000F000Fu) | Magic<T>::kPair, zeros[j % 2]);
#pragma unroll
          for (int n = 0; n < kColumns; ++n)
            multiply_add<T>(part[i][n], weights, inputs_of[n][2 * step], inputs_of[n][2 * step + 1]);
        }
      }
      // At the end of a group, and of this block's columns.
      const int through = chunk * kW4Columns + (half + 1) * 32;
      if (through % p.group_size != 0 && !(half == 1 && chunk + 1 == end)) continue;
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float scale = scale_of(group[i * 16 + j / 2 * 8], p.scales_are_bf16);
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
            sums[i][n][j] += scale * part[i][n][j];
            part[i][n][j] = 0.0f;
          }
        }
    }
  }
  __syncthreads();

  float* tile = reinterpret_cast<float*>(memory);  // [TOKENS, kOutStride], in place of the stages
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        tile[(n * 8 + lane % 4 * 2 + j % 2) * Shape::kOutStride + (warp * kTiles + i) * 16 + lane / 4 + j / 2 * 8] =
            sums[i][n][j];
  __syncthreads();
  const auto store = [&](int token, int row, float sum) {
    if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[row]);
    static_cast<T*>(p.out)[static_cast<int64_t>(token) * p.out_features + row] = from_float<T>(sum);
  };
  const int tokens = min(TOKENS, p.num_tokens - first_token);
  const int64_t step = static_cast<int64_t>(p.num_tokens) * p.padded_out;
  for (int i = threadIdx.x; i < tokens * kW4Rows; i += Shape::kThreads) {
    const int token = first_token + i / kW4Rows, row = row_tile * kW4Rows + i % kW4Rows;
    const float sum = tile[i / kW4Rows * Shape::kOutStride + i % kW4Rows];
    if (p.splits > 1) p.partial[split * step + static_cast<int64_t>(token) * p.padded_out + row] = sum;
    else if (row < p.out_features) store(token, row, sum);
  }
  if (p.splits == 1) return;
  // The last of the splits adds up what all of them wrote, in order of their columns.
  int* arrived = p.arrived + blockIdx.y * gridDim.x + blockIdx.x;
  int* is_last = reinterpret_cast<int*>(memory + Shape::kSharedBytes - 16);
  fence();
  __syncthreads();
  if (threadIdx.x == 0) *is_last = atomic_add(arrived, 1) == p.splits - 1;
  __syncthreads();
  if (!*is_last) return;
  fence();
  for (int i = threadIdx.x; i < tokens * kW4Rows; i += Shape::kThreads) {
    const int token = first_token + i / kW4Rows, row = row_tile * kW4Rows + i % kW4Rows;
    if (row >= p.out_features) continue;
    float sum = 0.0f;
    for (int s = 0; s < p.splits; ++s)
      sum += load_shared_by_blocks(p.partial + s * step + static_cast<int64_t>(token) * p.padded_out + row);
    store(token, row, sum);
  }
  if (threadIdx.x == 0) *arrived = 0;
}

}  // namespace cuda_ops
