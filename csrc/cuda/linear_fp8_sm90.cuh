// x @ weight.T of 8-bit floats for sm_90a. Both factors come by the tensor memory accelerator as they lie in memory, and
// warpgroups multiply them out of shared memory, weights on the left: 64 output features of a warpgroup, and as many
// columns as tokens. Sums of 128 columns are added up in float32 registers, times their scales where tiles have scales:
// the tensor cores keep about 14 bits of a sum of 8-bit floats (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
#pragma once

#include <primitives_sm90.cuh>

#include "linear_fp8.h"
#include "splits.cuh"

namespace cuda_ops {

template <int TOKENS> struct Fp8Shape {
  static constexpr int kGroups = kFp8Rows / 64;  // warpgroups that compute
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kBlocks = TOKENS <= 16 ? 2 : 1;  // of threads, on a multiprocessor
  static constexpr int kStages = 6;
  static constexpr int kCodeBytes = kFp8Rows * kFp8Columns, kInputBytes = TOKENS * kFp8Columns;
  static constexpr int kStageBytes = kCodeBytes + kInputBytes;
  static constexpr int kOutStride = kFp8Rows + 4;
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16) + 16;  // besides: two barriers a stage, is_last
  static_assert(kStages * kStageBytes >= TOKENS * kOutStride * 4);
};

struct Fp8Sm90Params {
  Fp8Params product;
  TensorMap codes, inputs;  // rows of in_features bytes as 16-bit values, in boxes of [128 or TOKENS, 64]
};

// One thread: waits until a stage is free, and has 128 columns of both factors copied to it.
template <int TOKENS>
__device__ __forceinline__ void copy_factors(const Fp8Sm90Params& p, unsigned char* memory, PhaseBarrier* full, int begin,
                                             int count) {
  using Shape = Fp8Shape<TOKENS>;
  for (int i = 0; i < count; ++i) {
    const int stage = i % Shape::kStages, column = (begin + i) * (kFp8Columns / 2);
    if (i >= Shape::kStages) barrier_wait(full + Shape::kStages + stage, (i / Shape::kStages - 1) % 2);  // it is empty
    barrier_arrive_expect(full + stage, Shape::kStageBytes);
    unsigned char* to = memory + stage * Shape::kStageBytes;
    copy_box(to, p.codes, full + stage, column, blockIdx.y * kFp8Rows, 0, 0);
    copy_box(to + Shape::kCodeBytes, p.inputs, full + stage, column, blockIdx.x * TOKENS, 0, 0);
  }
}

// Grid: (token tiles, row tiles, splits, or 1 where blocks take all splits of a tile: WALKS). Threads: a warpgroup of which
// one thread copies, two that compute. Shared memory: Fp8Shape. Moves the weights once for each tile of tokens. Bits of a
// token: as product_kernel's, not those of its batch.
template <class T, int TOKENS, bool BLOCKS, bool WALKS>
__global__ void __launch_bounds__(Fp8Shape<TOKENS>::kThreads, Fp8Shape<TOKENS>::kBlocks)
    fp8_sm90_kernel(const __grid_constant__ Fp8Sm90Params params) {
  using Shape = Fp8Shape<TOKENS>;
  const Fp8Params& p = params.product;
  unsigned char* memory = shared_memory();
  PhaseBarrier* full = reinterpret_cast<PhaseBarrier*>(memory + Shape::kStages * Shape::kStageBytes);
  PhaseBarrier* empty = full + Shape::kStages;
  const int begin = WALKS ? 0 : blockIdx.z * p.chunks_of_split;
  const int count = WALKS ? p.num_chunks : min(begin + p.chunks_of_split, p.num_chunks) - begin;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, Shape::kGroups * 4);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    if constexpr (Shape::kBlocks == 1) fewer_registers<24>();
    if (threadIdx.x == 0) copy_factors<TOKENS>(params, memory, full, begin, count);
    return;
  }
  if constexpr (Shape::kBlocks == 1) more_registers<240>();

  const int thread = threadIdx.x - 128, lane = thread % 32, group = thread / 128;
  const int first_token = blockIdx.x * TOKENS, first_row = blockIdx.y * kFp8Rows;
  float sums[TOKENS / 8][4] = {}, part[TOKENS / 8][4] = {}, totals[WALKS ? TOKENS / 8 : 1][4] = {};
  int left = p.chunks_of_split;  // of the split
  for (int i = 0; i < count; ++i) {
    const int stage = i % Shape::kStages;
    const unsigned char* codes = memory + stage * Shape::kStageBytes + group * 64 * kFp8Columns;
    const unsigned char* inputs = memory + stage * Shape::kStageBytes + Shape::kCodeBytes;
    barrier_wait(full + stage, i / Shape::kStages % 2);
    products_fence();
#pragma unroll
    for (int k = 0; k < kFp8Columns / 32; ++k)
      start_product_e4m3<TOKENS>(part, describe_tile(codes + k * 32, 16, 1024), describe_tile(inputs + k * 32, 16, 1024),
                                 k > 0);
    products_commit();
    float scale = 1.0f, scales[BLOCKS ? TOKENS / 8 : 1][2];
    if constexpr (BLOCKS) {  // loaded while the products run
      scale = p.scales[static_cast<int64_t>(blockIdx.y) * p.num_chunks + begin + i];
      const float* of_tokens =
          p.x_scales + static_cast<int64_t>(begin + i) * p.scales_stride + first_token + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < TOKENS / 8; ++n) scales[n][0] = of_tokens[n * 8], scales[n][1] = of_tokens[n * 8 + 1];
    }
    products_wait<0>();
    hold(part);
    if (lane == 0) barrier_arrive(empty + stage);
#pragma unroll
    for (int n = 0; n < TOKENS / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (BLOCKS) sums[n][j] += part[n][j] * (scale * scales[n][j % 2]);
        else sums[n][j] += part[n][j];
      }
    if constexpr (WALKS) {
      if (--left && i + 1 < count) continue;
      left = p.chunks_of_split;
#pragma unroll
      for (int n = 0; n < TOKENS / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) totals[n][j] += sums[n][j], sums[n][j] = 0.0f;
    }
  }
  const auto sync = [] { sync_some(1, Shape::kGroups * 128); };
  sync();  // all have read the stages

  float* tile = reinterpret_cast<float*>(memory);  // [TOKENS, kOutStride], in place of the stages
#pragma unroll
  for (int n = 0; n < TOKENS / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      tile[(n * 8 + lane % 4 * 2 + j % 2) * Shape::kOutStride + thread / 32 * 16 + lane / 4 + j / 2 * 8] =
          WALKS ? totals[WALKS ? n : 0][j] : sums[n][j];
  sync();
  const SplitSums own{p.partial, p.arrived + blockIdx.y * gridDim.x + blockIdx.x, WALKS ? 1 : p.splits, static_cast<int>(blockIdx.z),
                      p.num_tokens, p.padded_out, p.out_features, first_token, min(TOKENS, p.num_tokens - first_token),
                      first_row};
  store_sums(own, tile, Shape::kOutStride, reinterpret_cast<int*>(empty + Shape::kStages), thread, Shape::kGroups * 128,
             sync, [&](int token, int row, float sum) {
               const int64_t at = first_token + token;
               if constexpr (!BLOCKS) sum = multiply(multiply(sum, p.x_scales[at]), p.scales[row]);
               if (p.bias) sum = add(sum, to_float(static_cast<const T*>(p.bias)[row]));
               static_cast<T*>(p.out)[at * p.out_features + row] = from_float<T>(sum);
             });
}

}  // namespace cuda_ops
