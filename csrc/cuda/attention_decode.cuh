// Attention of sequences that decode one token: keys are split among blocks of threads, the last of a sequence's blocks
// to finish adds up what they found, in the same launch (flash-decoding; PyTorch blog, October 2023).
#pragma once

#include "attention.cuh"

namespace cuda_ops {

__device__ __forceinline__ int first_key(const AttentionParams& p, int length) {
  return p.window && length > p.window ? length - p.window : 0;
}
__device__ __forceinline__ int first_split(const AttentionParams& p, int length) {
  return first_key(p, length) / kSplitKeys;
}
__device__ __forceinline__ int num_splits(const AttentionParams& p, int length) {
  return (length + kSplitKeys - 1) / kSplitKeys - first_split(p, length);
}

// What a warp does with 16 keys and their values, as the cache holds them in T; CodedTile has the same members.
template <class Value, int SIZE> struct PlainTile {
  using T = Value;
  static constexpr int D = SIZE;
  static constexpr int kStages = D <= 64 ? 3 : 2;
  static constexpr int kStride = D + 8;  // values a row in shared memory: an odd number of 16 bytes, no bank conflicts
  static constexpr int kStageBytes = 2 * 16 * kStride * 2;

  __device__ __forceinline__ PlainTile(const AttentionParams& p, const Sequence<T>& own, int row, int rows) {
    load_queries<T, D>(queries, p, own, row, rows);
  }

  // Starts the copy to a stage; rows outside [from, to) are zeros.
  __device__ __forceinline__ static void copy(unsigned char* memory, const AttentionParams& p, const Sequence<T>& own,
                                              int tile, int from, int to) {
    constexpr int kPieces = D / 8;
    T* stage = reinterpret_cast<T*>(memory);
    const int lane = threadIdx.x % 32, key = tile * 16 + lane % 16;
    const bool here = key >= from && key < to;
    const int64_t mine = here ? own.slot_at(p, key) * D : -1;
#pragma unroll
    for (int i = 0; i < kPieces / 2; ++i) {
      const int piece = i * 32 + lane, row = piece / kPieces, column = piece % kPieces * 8;
      const int64_t at = __shfl_sync(~0u, mine, row);
      const bool valid = at >= 0;
      const int64_t offset = valid ? at + column : 0;
      copy_async(stage + row * kStride + column, static_cast<const T*>(p.k_cache) + offset, valid);
      copy_async(stage + (16 + row) * kStride + column, static_cast<const T*>(p.v_cache) + offset, valid);
    }
  }

  __device__ __forceinline__ void multiply(float (&scores)[2][4], const unsigned char* stage) const {
    multiply_keys<T, D, 2>(scores, queries, reinterpret_cast<const T*>(stage), kStride);
  }

  // Takes scores of a stage's keys into the softmax, and their values.
  __device__ __forceinline__ void take(Softmax<D>& softmax, float (&scores)[2][4], const unsigned char* stage) {
    softmax.take(scores);
    multiply_values<T, D, 2>(softmax.out, scores, reinterpret_cast<const T*>(stage) + 16 * kStride, kStride);
  }

  __device__ __forceinline__ void finish(Softmax<D>& softmax) const { softmax.finish(); }

  // Which dimension column `i` of softmax.out[n] is.
  __device__ __forceinline__ static int dimension(int n, int i) { return n * 8 + i; }

  uint32_t queries[D / 16][4];
};

template <class Tile> struct DecodeShape {
  static constexpr int kWarps = Tile::D <= 128 ? 4 : 2;
  static constexpr int kStagesBytes = kWarps * Tile::kStages * Tile::kStageBytes;
  static constexpr int kFoundBytes = kWarps * kDecodeRows * (Tile::D + 2) * 4;
  static constexpr int kSharedBytes = (kStagesBytes > kFoundBytes ? kStagesBytes : kFoundBytes) + 16;
};

// The sum of what `parts` places found for row r and column d, before the division; most and sum are theirs together.
struct Joined {
  float most, sum, out;
};

template <int D, class Read>
__device__ __forceinline__ Joined join(const float* parts, int count, int64_t step, int r, int d, const Read& read) {
  const float* row = parts + r * (D + 2);
  Joined all{-INFINITY, 0.0f, 0.0f};
  for (int i = 0; i < count; ++i) all.most = fmaxf(all.most, read(row + i * step + D));
  const float finite = all.most == -INFINITY ? 0.0f : all.most;
  for (int i = 0; i < count; ++i) {
    const float* part = row + i * step;
    const float factor = exp2_fast(read(part + D) - finite);
    all.sum += read(part + D + 1) * factor;
    all.out += read(part + d) * factor;
  }
  return all;
}

template <class T, int D>
__device__ __forceinline__ void store_row(const AttentionParams& p, const Sequence<T>& own, int row, int d, Joined all) {
  const int head = own.head * p.group + row;
  const float factor = join_sink(p, head, all.most, all.sum);
  static_cast<T*>(p.out)[(static_cast<int64_t>(own.first_token) * p.num_heads + head) * D + d] =
      from_float<T>(all.out * factor / all.sum);
}

// Grid: (pieces of work or fewer, num_kv_heads * row_tiles). A piece is kSplitKeys keys of a sequence; blocks go over
// pieces in steps of the grid, so that a captured launch serves any lengths. Threads: 4 warps (2 for D > 128), each with
// 16 keys at a time and a pipeline of its own, no barrier among them until they add up. Shared memory: DecodeShape.
// Moves every key and value once, in copies of 16 bytes past the first-level cache.
template <class Tile>
__global__ void __launch_bounds__(DecodeShape<Tile>::kWarps * 32) decode_kernel(AttentionParams p) {
  using Shape = DecodeShape<Tile>;
  using T = typename Tile::T;
  constexpr int D = Tile::D;
  unsigned char* memory = shared_memory();
  unsigned char* stages = memory + threadIdx.x / 32 * Tile::kStages * Tile::kStageBytes;
  float* found = reinterpret_cast<float*>(memory);  // [kWarps, 16, D + 2], in place of the stages once they are read
  int* is_last = reinterpret_cast<int*>(memory + Shape::kSharedBytes - 16);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int kv_head = blockIdx.y / p.row_tiles, first_row = blockIdx.y % p.row_tiles * kDecodeRows;
  const int rows = min(p.group - first_row, kDecodeRows);

  for (int piece = blockIdx.x;; piece += gridDim.x) {
    const Work work = find_work(p.num_seqs, piece, [&](int seq) {
      return p.cu_seqlens_q[seq + 1] - p.cu_seqlens_q[seq] == 1 ? num_splits(p, p.seq_lens[seq]) : 0;
    });
    if (work.seq < 0) return;
    const Sequence<T> own(p, work.seq, kv_head);
    const int begin = first_key(p, own.length), split = first_split(p, own.length) + work.item;
    const int from = max(begin, split * kSplitKeys), to = min(own.length, (split + 1) * kSplitKeys);
    const int last_tile = (to + 15) / 16;

    Tile keys(p, own, first_row + lane / 4, first_row + rows);
    Softmax<D> softmax;
    softmax.clear();
    const int position[2] = {own.length - 1, own.length - 1};
    int tile = from / 16 + warp, ahead = tile;
    const auto start_copy = [&](int stage) {
      if (ahead < last_tile) Tile::copy(stages + stage * Tile::kStageBytes, p, own, ahead, from, to);
      copy_commit();
      ahead += Shape::kWarps;
    };
#pragma unroll
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) start_copy(stage);
    for (int stage = 0; tile < last_tile; tile += Shape::kWarps, stage = (stage + 1) % Tile::kStages) {
      copy_wait<Tile::kStages - 2>();
      __syncwarp();  // all lanes' copies have landed, and all lanes have read the stage that is filled next
      start_copy((stage + Tile::kStages - 1) % Tile::kStages);
      const unsigned char* now = stages + stage * Tile::kStageBytes;
      float scores[2][4];
      keys.multiply(scores, now);
      mask(scores, p, tile * 16 + lane % 4 * 2, position, tile * 16 < from || tile * 16 + 16 > to);
      keys.take(softmax, scores, now);
    }
    keys.finish(softmax);
    __syncthreads();

    // Warps add up in shared memory.
    const int64_t step = kDecodeRows * (D + 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* row = found + warp * step + (lane / 4 + 8 * i) * (D + 2);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        row[Tile::dimension(n, lane % 4 * 2)] = softmax.out[n][2 * i];
        row[Tile::dimension(n, lane % 4 * 2 + 1)] = softmax.out[n][2 * i + 1];
      }
      if (lane % 4 == 0) row[D] = softmax.most[i], row[D + 1] = softmax.sum[i];
    }
    __syncthreads();
    const auto read_own = [](const float* at) { return *at; };
    const auto read_others = [](const float* at) { return load_shared_by_blocks(at); };
    const int splits = num_splits(p, own.length);
    const int64_t cell = (static_cast<int64_t>(work.seq) * p.num_kv_heads + kv_head) * p.row_tiles + first_row / 16;
    const int64_t part_step = min(p.group, kDecodeRows) * (D + 2);
    float* parts = p.partial + cell * p.max_splits * part_step;
    for (int i = threadIdx.x; i < rows * D; i += blockDim.x) {
      const int r = i / D, d = i % D;
      const Joined all = join<D>(found, Shape::kWarps, step, r, d, read_own);
      if (splits == 1) {
        store_row<T, D>(p, own, first_row + r, d, all);
        continue;
      }
      float* row = parts + work.item * part_step + r * (D + 2);
      row[d] = all.out;
      if (d == 0) row[D] = all.most, row[D + 1] = all.sum;
    }
    if (splits > 1) {
      // The last block of the sequence adds up what all of them wrote, in order of their keys.
      fence();
      __syncthreads();
      if (threadIdx.x == 0) *is_last = atomic_add(p.arrived + cell, 1) == splits - 1;
      __syncthreads();
      if (*is_last) {
        fence();
        for (int i = threadIdx.x; i < rows * D; i += blockDim.x)
          store_row<T, D>(p, own, first_row + i / D, i % D,
                          join<D>(parts, splits, part_step, i / D, i % D, read_others));
        if (threadIdx.x == 0) p.arrived[cell] = 0;
      }
    }
    __syncthreads();  // before the stages are filled again
  }
}

}  // namespace cuda_ops
