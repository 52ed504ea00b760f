// Multi-head latent attention over a paged cache of one vector a token, which all heads share: its key, and with its
// first RANK numbers its value (DeepSeek V2, arXiv 2405.04434). Contract: latent_attention in engines/ops/attention.py.
//
// Rows are the heads of a sequence's tokens end to end, as they lie in q: a block of threads takes 16 * M of them, so that
// vectors that were copied once meet all heads. A row's sum of RANK numbers is too wide for one warp: warps split scores
// by keys, and sums by columns; weights go from the ones to the others through shared memory.
#pragma once

#include "attention_decode.cuh"
#include "vectors.cuh"

// Sizes that kernels are compiled for: of the latent, and of the rotated key.
#ifndef CUDA_OPS_LATENTS
#define CUDA_OPS_LATENTS(X) X(512, 64)
#endif

namespace cuda_ops {

struct LatentParams {
  const void* q;                // [num_tokens, num_heads, RANK + ROPE], dense
  const void* cache;            // [num_blocks, block_size, RANK + ROPE], dense
  const int32_t* cu_seqlens_q;  // [num_seqs + 1]
  const int32_t* seq_lens;      // [num_seqs]
  const int32_t* block_tables;  // [num_seqs, table_stride]
  void* out;                    // [num_tokens, num_heads, RANK], dense
  float* partial;               // [num_seqs * decode_tiles, max_splits, 16 * M, RANK + 2]
  int* arrived;                 // [num_seqs * decode_tiles], zero before and after
  int num_seqs, num_heads, table_stride, block_size;
  int decode_tiles;  // of rows of one token
  int max_splits;    // of a decoding sequence
  float scale;
};

// Keys that one block takes of a decoding sequence, at fixed positions, as kSplitKeys: 1,024 vectors of 576 are 1.2 MB,
// what is written and read for them 66 KB at 16 heads.
constexpr int kLatentSplit = 1024;

template <int RANK, int ROPE, int M> struct LatentShape {
  static constexpr int kSize = RANK + ROPE;
  static constexpr int kRows = 16 * M;
  static constexpr int kWarps = RANK / 64;  // each has 64 columns of the sums
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kKeys = 32;          // of a tile: one a lane where rows are weighed
  static constexpr int kStride = kSize + 8;
  static constexpr int kScoreStride = kKeys + 1, kWeightStride = kKeys + 8;
  static constexpr int kStages = kRows * kStride * 2;  // where things begin, in bytes
  static constexpr int kStageBytes = kKeys * kStride * 2;
  static constexpr int kScores = kStages + 2 * kStageBytes;
  static constexpr int kWeights = kScores + kRows * kScoreStride * 4;
  static constexpr int kSums = kWeights + kRows * kWeightStride * 2;  // most, sum and factor of every row
  static constexpr int kSharedBytes = kSums + 3 * kRows * 4 + 16;
  static_assert(kSize % 32 == 0 && RANK % 64 == 0);
};

// What a block does at a time: rows of one tile against keys [from, to) of its sequence.
struct LatentWork {
  int seq, tile, split, splits, first_token, num_tokens, length;
};

template <int ROWS> __device__ __forceinline__ LatentWork find_latent_work(const LatentParams& p, int item) {
  const auto tokens_of = [&](int seq) { return p.cu_seqlens_q[seq + 1] - p.cu_seqlens_q[seq]; };
  const auto splits_of = [&](int seq) {
    return tokens_of(seq) == 1 ? (p.seq_lens[seq] + kLatentSplit - 1) / kLatentSplit : 1;
  };
  const Work work = find_work(p.num_seqs, item, [&](int seq) {
    return (tokens_of(seq) * p.num_heads + ROWS - 1) / ROWS * splits_of(seq);
  });
  if (work.seq < 0) return {-1, 0, 0, 0, 0, 0, 0};
  const int splits = splits_of(work.seq);
  return {work.seq, work.item / splits, work.item % splits, splits, p.cu_seqlens_q[work.seq], tokens_of(work.seq),
          p.seq_lens[work.seq]};
}

// Products of 16 rows and 8 keys at a time, a warp each, scaled, to the base 2.
template <class T, class Shape, int M>
__device__ __forceinline__ void score_tile(float* scores, const T* queries, const T* keys, float scale) {
  const int lane = threadIdx.x % 32;
  constexpr int kColumns = Shape::kKeys / 8;
  for (int unit = threadIdx.x / 32; unit < M * kColumns; unit += Shape::kWarps) {
    const int m = unit / kColumns, n = unit % kColumns;
    const T* row = queries + (m * 16 + lane % 16) * Shape::kStride + lane / 16 * 8;
    const T* key = keys + (n * 8 + lane % 8) * Shape::kStride + lane / 8 * 8;
    float even[4] = {}, odd[4] = {};  // two sums, so that products do not wait for each other
#pragma unroll 3
    for (int k = 0; k < Shape::kSize; k += 32) {
      uint32_t a[4], c[4], b[4];
      load_matrices(a, row + k);
      load_matrices(c, row + k + 16);
      load_matrices(b, key + k);
      multiply_add<T>(even, a, b[0], b[1]);
      multiply_add<T>(odd, c, b[2], b[3]);
    }
    float* to = scores + (m * 16 + lane / 4) * Shape::kScoreStride + n * 8 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i / 2 * 8 * Shape::kScoreStride + i % 2] = (even[i] + odd[i]) * scale;
  }
}

// Scores to weights, a row a warp at a time, a key a lane. sums: most, sum and factor, kRows of each.
template <class T, class Shape>
__device__ __forceinline__ void weigh_tile(T* weights, float* sums, const float* scores, int first_key, int to,
                                           const LatentWork& work, int num_heads) {
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < Shape::kRows; r += Shape::kWarps) {
    const int position = work.length - work.num_tokens + (work.tile * Shape::kRows + r) / num_heads;
    const int key = first_key + lane;
    const float score = key < to && key <= position ? scores[r * Shape::kScoreStride + lane] : -INFINITY;
    const float before = sums[r], most = fmaxf(max_of_warp(score), before);
    const float finite = most == -INFINITY ? 0.0f : most, weight = exp2_fast(score - finite);
    const float sum = sum_of_warp(weight);
    weights[r * Shape::kWeightStride + lane] = from_float<T>(weight);
    __syncwarp();  // all lanes have read what was most before
    if (lane == 0) {
      const float factor = exp2_fast(before - finite);
      sums[r] = most;
      sums[Shape::kRows + r] = sums[Shape::kRows + r] * factor + sum;
      sums[2 * Shape::kRows + r] = factor;
    }
  }
}

// out: 16 M rows and the warp's 64 columns, scaled to the new maxima; adds weights times values.
template <class T, class Shape, int M>
__device__ __forceinline__ void sum_tile(float (&out)[M][8][4], const T* weights, const float* sums, const T* keys) {
  const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 64;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float factor = sums[2 * Shape::kRows + m * 16 + lane / 4 + 8 * i];
#pragma unroll
      for (int n = 0; n < 8; ++n) out[m][n][2 * i] *= factor, out[m][n][2 * i + 1] *= factor;
    }
#pragma unroll
  for (int k = 0; k < Shape::kKeys; k += 16) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
      load_matrices(a[m], weights + (m * 16 + lane % 16) * Shape::kWeightStride + k + lane / 16 * 8);
    const T* row = keys + (k + lane % 16) * Shape::kStride + column + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, row + n * 8);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add<T>(out[m][n], a[m], b[0], b[1]);
        multiply_add<T>(out[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Grid: pieces of work or fewer, blocks go over pieces in steps of the grid. A piece is 16 M rows and, of a sequence that
// decodes, kLatentSplit keys, whose sums the last block of those rows adds up. Threads: a warp for each 64 of RANK.
// Shared memory: LatentShape. Moves every vector once for each 16 M rows; operations: 2 * (2 * RANK + ROPE) a row and key.
template <class T, int RANK, int ROPE, int M>
__global__ void __launch_bounds__(LatentShape<RANK, ROPE, M>::kThreads) latent_kernel(LatentParams p) {
  using Shape = LatentShape<RANK, ROPE, M>;
  constexpr int kPieces = Shape::kSize / 8;
  unsigned char* memory = shared_memory();
  T* queries = reinterpret_cast<T*>(memory);
  float* scores = reinterpret_cast<float*>(memory + Shape::kScores);
  T* weights = reinterpret_cast<T*>(memory + Shape::kWeights);
  float* sums = reinterpret_cast<float*>(memory + Shape::kSums);
  int* is_last = reinterpret_cast<int*>(sums + 3 * Shape::kRows);
  const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 64 + lane % 4 * 2;

  for (int item = blockIdx.x;; item += gridDim.x) {
    const LatentWork work = find_latent_work<Shape::kRows>(p, item);
    if (work.seq < 0) return;
    const int first_row = work.tile * Shape::kRows, all_rows = work.num_tokens * p.num_heads;
    const int rows = min(all_rows - first_row, Shape::kRows);
    const int last = work.length - work.num_tokens + (first_row + rows - 1) / p.num_heads;  // position of the last row
    const int from = work.split * kLatentSplit, to = min(last + 1, work.splits > 1 ? from + kLatentSplit : last + 1);
    const int64_t base = static_cast<int64_t>(work.first_token) * p.num_heads + first_row;
    const int32_t* table = p.block_tables + static_cast<int64_t>(work.seq) * p.table_stride;
    const auto start_copy = [&](int tile) {
      T* stage = reinterpret_cast<T*>(memory + Shape::kStages + tile % 2 * Shape::kStageBytes);
      for (int piece = threadIdx.x; piece < Shape::kKeys * kPieces; piece += Shape::kThreads) {
        const int r = piece / kPieces, at = piece % kPieces * 8, key = from + tile * Shape::kKeys + r;
        const bool valid = key < to;
        const int64_t slot = valid ? static_cast<int64_t>(table[key / p.block_size]) * p.block_size + key % p.block_size : 0;
        copy_async(stage + r * Shape::kStride + at, static_cast<const T*>(p.cache) + (valid ? slot * Shape::kSize + at : 0),
                   valid);
      }
      copy_commit();
    };
    for (int piece = threadIdx.x; piece < Shape::kRows * kPieces; piece += Shape::kThreads) {
      const int r = piece / kPieces, at = piece % kPieces * 8;
      copy_async(queries + r * Shape::kStride + at,
                 static_cast<const T*>(p.q) + (r < rows ? (base + r) * Shape::kSize + at : 0), r < rows);
    }
    start_copy(0);
    for (int r = threadIdx.x; r < Shape::kRows; r += Shape::kThreads) sums[r] = -INFINITY, sums[Shape::kRows + r] = 0.0f;
    float out[M][8][4] = {};
    const int tiles = (to - from + Shape::kKeys - 1) / Shape::kKeys;
    for (int tile = 0; tile < tiles; ++tile) {
      const T* keys = reinterpret_cast<const T*>(memory + Shape::kStages + tile % 2 * Shape::kStageBytes);
      copy_wait<0>();
      __syncthreads();  // all threads' copies have landed, and all have read the stage that is filled next
      if (tile + 1 < tiles) start_copy(tile + 1);
      score_tile<T, Shape, M>(scores, queries, keys, p.scale * kLog2e);
      __syncthreads();  // all scores are there
      weigh_tile<T, Shape>(weights, sums, scores, from + tile * Shape::kKeys, to, work, p.num_heads);
      __syncthreads();  // all weights are there
      sum_tile<T, Shape, M>(out, weights, sums, keys);
    }

    const int64_t step = Shape::kRows * (RANK + 2);
    const int64_t cell = static_cast<int64_t>(work.seq) * p.decode_tiles + work.tile;
    float* parts = p.partial + cell * p.max_splits * step;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = m * 16 + lane / 4 + 8 * i;
        if (r >= rows) continue;
        if (work.splits == 1) {
          const float factor = 1.0f / sums[Shape::kRows + r];
          T* row = static_cast<T*>(p.out) + (base + r) * RANK + column;
#pragma unroll
          for (int n = 0; n < 8; ++n)
            *reinterpret_cast<uint32_t*>(row + n * 8) =
                pack<T>(out[m][n][2 * i] * factor, out[m][n][2 * i + 1] * factor);
          continue;
        }
        float* row = parts + work.split * step + r * (RANK + 2);
#pragma unroll
        for (int n = 0; n < 8; ++n)
          *reinterpret_cast<Vector<float, 2>*>(row + column + n * 8) = {out[m][n][2 * i], out[m][n][2 * i + 1]};
        if (column == 0) row[RANK] = sums[r], row[RANK + 1] = sums[Shape::kRows + r];
      }
    if (work.splits > 1) {
      // The last block of these rows adds up what all of them wrote, in order of their keys.
      fence();
      __syncthreads();
      if (threadIdx.x == 0) *is_last = atomic_add(p.arrived + cell, 1) == work.splits - 1;
      __syncthreads();
      if (*is_last) {
        fence();
        const auto read = [](const float* at) { return load_shared_by_blocks(at); };
        for (int i = threadIdx.x; i < rows * RANK; i += Shape::kThreads) {
          const Joined all = join<RANK>(parts, work.splits, step, i / RANK, i % RANK, read);
          static_cast<T*>(p.out)[(base + i / RANK) * RANK + i % RANK] = from_float<T>(all.out / all.sum);
        }
        if (threadIdx.x == 0) p.arrived[cell] = 0;
      }
    }
    __syncthreads();  // before queries and stages are filled again
  }
}

// ---- new vectors ----

// Unit: what is copied at once.
template <class Unit> struct LatentWriteParams {
  const Unit* latent;           // [num_tokens, size], dense rows
  Unit* cache;                  // [num_slots, size], dense
  const int64_t* slot_mapping;  // [num_tokens]; a slot outside the cache is the padding of a captured batch
  int64_t token_stride, num_slots;
  int size;
};

// Grid: a block a token. Threads: 128. Moves the vectors twice.
template <class Unit> __global__ void __launch_bounds__(128) latent_write_kernel(LatentWriteParams<Unit> p) {
  const int64_t token = blockIdx.x, slot = p.slot_mapping[token];
  if (slot < 0 || slot >= p.num_slots) return;
  for (int i = threadIdx.x; i < p.size; i += blockDim.x)
    p.cache[slot * p.size + i] = p.latent[token * p.token_stride + i];
}

}  // namespace cuda_ops
