// What the attention kernels have in common: finding work, loading queries, the softmax of a tile, storing rows.
#pragma once

#include <primitives.cuh>

#include <cmath>

#include "attention.h"

namespace cuda_ops {

constexpr float kLog2e = 1.4426950408889634f;

struct Work {
  int seq;   // -1: none
  int item;  // of that sequence
};

// The sequence that holds the item-th piece of work, when sequence i has count(i) of them. A warp together.
template <class Count> __device__ __forceinline__ Work find_work(int num_seqs, int item, const Count& count) {
  const int lane = threadIdx.x % 32;
  int before = 0;
  for (int first = 0; first < num_seqs; first += 32) {
    const int seq = first + lane, own = seq < num_seqs ? count(seq) : 0;
    int through = own;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const int other = __shfl_up_sync(~0u, through, by);
      if (lane >= by) through += other;
    }
    const unsigned past = __ballot_sync(~0u, before + through > item);
    if (past) {
      const int holder = __ffs(past) - 1;
      return {first + holder, item - before - __shfl_sync(~0u, through - own, holder)};
    }
    before += __shfl_sync(~0u, through, 31);
  }
  return {-1, 0};
}

// One sequence and KV head, and what a token of it may see.
template <class T> struct Sequence {
  __device__ __forceinline__ Sequence(const AttentionParams& p, int seq, int kv_head)
      : first_token(p.cu_seqlens_q[seq]), num_tokens(p.cu_seqlens_q[seq + 1] - first_token), length(p.seq_lens[seq]),
        head(kv_head), table(p.block_tables + static_cast<int64_t>(seq) * p.table_stride) {}
  __device__ __forceinline__ int position(int row, int group) const { return length - num_tokens + row / group; }
  // Which vector of the cache a key is.
  __device__ __forceinline__ int64_t slot_at(const AttentionParams& p, int key) const {
    const int64_t block = table[key >> p.block_shift], offset = key & ((1 << p.block_shift) - 1);
    return ((block * p.num_kv_heads + head) << p.block_shift) + offset;
  }
  int first_token, num_tokens, length, head;
  const int32_t* table;
};

// Rows of this sequence, in tiles of R; 0 for one that decodes.
__device__ __forceinline__ int prefill_tiles(const AttentionParams& p, int seq, int rows_of_tile) {
  const int tokens = p.cu_seqlens_q[seq + 1] - p.cu_seqlens_q[seq];
  return tokens > 1 ? (tokens * p.group + rows_of_tile - 1) / rows_of_tile : 0;
}

// Queries of 16 rows as the left factor of multiply_add: of this lane rows `row` and row + 8. Rows past `rows` are 0.
template <class T, int D>
__device__ __forceinline__ void load_queries(uint32_t (&to)[D / 16][4], const AttentionParams& p,
                                             const Sequence<T>& own, int row, int rows) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = row + 8 * i;
    const T* from = static_cast<const T*>(p.q) + (own.first_token + r / p.group) * p.q_token_stride +
                    (own.head * p.group + r % p.group) * p.q_head_stride + column;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      to[k][i] = r < rows ? *reinterpret_cast<const uint32_t*>(from + k * 16) : 0;
      to[k][i + 2] = r < rows ? *reinterpret_cast<const uint32_t*>(from + k * 16 + 8) : 0;
    }
  }
}

// Softmax as it goes over tiles (arXiv 2112.09332, 2205.14135), of this lane's two rows. Exponents are to the base 2.
template <int D> struct Softmax {
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 2; ++i) most[i] = -INFINITY, sum[i] = 0.0f;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
  }

  // scores: of N tiles of 8 keys, -infinity where hidden; become weights. What was summed before is scaled to the new
  // maximum.
  template <int N> __device__ __forceinline__ void take(float (&scores)[N][4]) {
    float factor[2];
    weigh(scores, factor);
    scale(factor);
  }

  // The same but for `out`, which is to be scaled by these factors before more is added to it.
  template <int N> __device__ __forceinline__ void weigh(float (&scores)[N][4], float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float now = most[i];
#pragma unroll
      for (int n = 0; n < N; ++n) now = fmaxf(now, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
      const float finite = now == -INFINITY ? 0.0f : now;
      factor[i] = exp2_fast(most[i] - finite);
      most[i] = now;
      sum[i] *= factor[i];
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int j = 2 * i; j < 2 * i + 2; ++j) {
          scores[n][j] = exp2_fast(scores[n][j] - finite);
          sum[i] += scores[n][j];
        }
    }
  }

  __device__ __forceinline__ void scale(const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] *= factor[i / 2];
  }

  // The sum over all keys; before, each lane has that of its own columns.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
      sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
    }
  }

  float most[2], sum[2], out[D / 8][4];
};

// Products to scores to the base 2: scale, softcap, and -infinity for keys that a row may not see.
// key: of scores[0][0]; position: of the two rows' tokens. hide: whether any of these keys may be hidden.
template <int N>
__device__ __forceinline__ void mask(float (&scores)[N][4], const AttentionParams& p, int key, const int (&position)[2],
                                     bool hide) {
  if (p.softcap != 0.0f) {
    const float inner = p.scale / p.softcap, outer = p.softcap * kLog2e;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = outer * tanhf(scores[n][i] * inner);
  } else {
    const float scale = p.scale * kLog2e;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] *= scale;
  }
  if (!hide) return;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = key + n * 8 + i % 2, own = position[i / 2];
      if (at > own || (p.window && at <= own - p.window)) scores[n][i] = -INFINITY;
    }
}

// Products of queries and N * 8 keys that lie in shared memory, `stride` values a row.
template <class T, int D, int N>
__device__ __forceinline__ void multiply_keys(float (&scores)[N][4], const uint32_t (&queries)[D / 16][4],
                                              const T* keys, int stride) {
  const int lane = threadIdx.x % 32;
  const T* row = keys + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      load_matrices(b, row + n * 8 * stride + k * 16);
      multiply_add<T>(scores[n], queries[k], b[0], b[1]);
      multiply_add<T>(scores[n + 1], queries[k], b[2], b[3]);
    }
}

// out += weights * values, for N * 8 values that lie in shared memory. Weights are rounded to T.
template <class T, int D, int N>
__device__ __forceinline__ void multiply_values(float (&out)[D / 8][4], const float (&weights)[N][4], const T* values,
                                                int stride) {
  const int lane = threadIdx.x % 32;
  const T* row = values + (lane / 8 % 2 * 8 + lane % 8) * stride + lane / 16 * 8;
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    const uint32_t a[4] = {pack<T>(weights[n][0], weights[n][1]), pack<T>(weights[n][2], weights[n][3]),
                           pack<T>(weights[n + 1][0], weights[n + 1][1]),
                           pack<T>(weights[n + 1][2], weights[n + 1][3])};
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t b[4];
      load_matrices_transposed(b, row + n * 8 * stride + d * 16);
      multiply_add<T>(out[2 * d], a, b[0], b[1]);
      multiply_add<T>(out[2 * d + 1], a, b[2], b[3]);
    }
  }
}

// Joins a sink to a softmax with maximum `most`: what the sums must be scaled by, once `sum` has it.
__device__ __forceinline__ float join_sink(const AttentionParams& p, int head, float most, float& sum) {
  if (!p.sinks) return 1.0f;
  const float sink = p.sinks[head] * kLog2e, now = fmaxf(most, sink), factor = exp2_fast(most - now);
  sum = sum * factor + exp2_fast(sink - now);
  return factor;
}

// Divides this lane's rows, `row` and row + 8 of the sequence, by their sums and stores those below `rows`.
template <class T, int D>
__device__ __forceinline__ void store_rows(const AttentionParams& p, const Sequence<T>& own, const Softmax<D>& softmax,
                                           int row, int rows) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = row + 8 * i;
    if (r >= rows) continue;
    const int head = own.head * p.group + r % p.group;
    float sum = softmax.sum[i];
    const float factor = join_sink(p, head, softmax.most[i], sum) / sum;
    T* out = static_cast<T*>(p.out) +
             (static_cast<int64_t>(own.first_token + r / p.group) * p.num_heads + head) * D + threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<uint32_t*>(out + n * 8) =
          pack<T>(softmax.out[n][2 * i] * factor, softmax.out[n][2 * i + 1] * factor);
  }
}

}  // namespace cuda_ops
