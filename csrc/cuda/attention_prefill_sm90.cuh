// Prefill attention for sm_90a, after FlashAttention-3 (arXiv 2407.08608): one warp copies tiles of the paged cache by
// the tensor memory accelerator, two warpgroups compute; the products of the next tile run while this one's softmax does.
#pragma once

#include <primitives_sm90.cuh>

#include "attention.cuh"

namespace cuda_ops {

template <int D> struct Sm90Shape {
  static constexpr int kGroups = 2;              // of 4 warps that compute, 64 rows each
  static constexpr int kRows = kGroups * 64;
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kKeys = 128;              // of a tile
  static constexpr int kStages = 2;
  static constexpr int kHalf = kKeys * 128;      // bytes of 64 columns of a tile
  static constexpr int kTile = kHalf * (D / 64);
  static constexpr int kSharedBytes = 2 * kStages * kTile + 64 * kStages;
};

struct Sm90Params {
  AttentionParams attention;
  TensorMap keys, values;  // [num_blocks, num_kv_heads, block_size, D], in boxes of [min(block_size, 128), 64]
};

// Where tiles and barriers lie; a barrier is passed once for each tile that a stage holds.
template <int D> struct Sm90Memory {
  using Shape = Sm90Shape<D>;
  __device__ __forceinline__ explicit Sm90Memory(unsigned char* memory)
      : tiles(memory), barriers(reinterpret_cast<PhaseBarrier*>(memory + 2 * Shape::kStages * Shape::kTile)) {}
  // what: 0 keys, 1 values
  __device__ __forceinline__ unsigned char* tile(int what, int i) const {
    return tiles + (what * Shape::kStages + i % Shape::kStages) * Shape::kTile;
  }
  __device__ __forceinline__ PhaseBarrier* full(int what, int i) const {
    return barriers + what * Shape::kStages + i % Shape::kStages;
  }
  __device__ __forceinline__ PhaseBarrier* empty(int what, int i) const {
    return barriers + (2 + what) * Shape::kStages + i % Shape::kStages;
  }
  __device__ __forceinline__ static int parity(int i) { return i / Shape::kStages % 2; }
  unsigned char* tiles;
  PhaseBarrier* barriers;
};

// Of a block's tiles of keys: the first, how many, and which keys its rows may see.
struct Sm90Range {
  int first, count, from, to;
};

// One warp: waits until a stage is free, and has the blocks of the cache that hold keys of the range copied to it.
template <class T, int D>
__device__ __forceinline__ void copy_tiles(const Sm90Params& p, const Sequence<T>& own, const Sm90Range& range,
                                           const Sm90Memory<D>& memory) {
  using Shape = Sm90Shape<D>;
  const int lane = threadIdx.x % 32, shift = p.attention.block_shift;
  const int rows = min(1 << shift, Shape::kKeys);  // of a box
  for (int i = 0; i < range.count; ++i) {
    const int tile = (range.first + i) * Shape::kKeys;
    const int first = max(range.from, tile) / rows, last = (min(range.to, tile + Shape::kKeys) + rows - 1) / rows;
    for (int what = 0; what < 2; ++what) {
      PhaseBarrier* full = memory.full(what, i);
      if (i >= Shape::kStages) barrier_wait(memory.empty(what, i), memory.parity(i - Shape::kStages));
      if (lane == 0) barrier_arrive_expect(full, (last - first) * rows * D * 2);
      for (int box = lane; box < (last - first) * (D / 64); box += 32) {
        const int key = (first + box / (D / 64)) * rows, half = box % (D / 64);
        copy_box(memory.tile(what, i) + half * Shape::kHalf + (key - tile) * 128, what ? p.values : p.keys, full,
                 half * 64, key & ((1 << shift) - 1), own.head, own.table[key >> shift]);
      }
    }
  }
}

// Scores of 64 rows and a tile of keys.
template <class T, int D>
__device__ __forceinline__ void start_scores(float (&scores)[Sm90Shape<D>::kKeys / 8][4],
                                             const uint32_t (&queries)[D / 16][4], const unsigned char* keys) {
  products_fence();
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
    start_product<T, Sm90Shape<D>::kKeys, true>(
        scores, queries[k], describe_tile(keys + k / 4 * Sm90Shape<D>::kHalf + k % 4 * 32, 16, 1024), k > 0);
  products_commit();
}

// out += weights * values of a tile.
template <class T, int D>
__device__ __forceinline__ void start_values(float (&out)[D / 8][4],
                                             const uint32_t (&weights)[Sm90Shape<D>::kKeys / 16][4],
                                             const unsigned char* values) {
  products_fence();
#pragma unroll
  for (int k = 0; k < Sm90Shape<D>::kKeys / 16; ++k)
    start_product<T, D, false>(out, weights[k], describe_tile(values + k * 2048, Sm90Shape<D>::kHalf, 1024), true);
  products_commit();
}

template <class T, int N>
__device__ __forceinline__ void round_weights(uint32_t (&to)[N / 2][4], const float (&weights)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    to[n / 2][n % 2 * 2] = pack<T>(weights[n][0], weights[n][1]);
    to[n / 2][n % 2 * 2 + 1] = pack<T>(weights[n][2], weights[n][3]);
  }
}

// Rows of values that were not copied, or that no row may see and nobody may have written, become 0: a weight of 0 times
// NaN would be NaN. All threads that compute.
template <int D>
__device__ __forceinline__ void clear_unseen(unsigned char* values, const Sm90Range& range, int tile, int rows_of_box) {
  using Shape = Sm90Shape<D>;
  const int begin = tile * Shape::kKeys, from = range.from / rows_of_box * rows_of_box;
  if (begin >= from && begin + Shape::kKeys <= range.to) return;
  for (int piece = threadIdx.x - 128; piece < Shape::kTile / 16; piece += Shape::kGroups * 128) {
    const int key = begin + piece / 8 % Shape::kKeys;
    if (key < from || key >= range.to) *reinterpret_cast<uint4*>(values + piece * 16) = uint4{0, 0, 0, 0};
  }
  fence_async();
  sync_some(1, Shape::kGroups * 128);
}

template <class T, int D>
__device__ __forceinline__ void attend_tiles(const Sm90Params& params, const Sequence<T>& own, const Sm90Range& range,
                                             const Sm90Memory<D>& memory, int first_row, int first_position,
                                             int last_position, int rows) {
  using Shape = Sm90Shape<D>;
  const AttentionParams& p = params.attention;
  const int lane = threadIdx.x % 32, row = first_row + (static_cast<int>(threadIdx.x) / 32 - 4) * 16 + lane / 4;
  const bool speaks = lane == 0;  // for its warp, when it has read a stage
  const int position[2] = {own.position(row, p.group), own.position(row + 8, p.group)};
  const int rows_of_box = min(1 << p.block_shift, Shape::kKeys);

  uint32_t queries[D / 16][4];
  load_queries<T, D>(queries, p, own, row, rows);
  Softmax<D> softmax;
  softmax.clear();
  float scores[Shape::kKeys / 8][4], factor[2];
  uint32_t weights[Shape::kKeys / 16][4];
  const auto weigh = [&](int i) {
    const int begin = (range.first + i) * Shape::kKeys;
    const bool hide = begin + Shape::kKeys > first_position + 1 || (p.window && begin <= last_position - p.window);
    mask(scores, p, begin + lane % 4 * 2, position, hide);
    softmax.weigh(scores, factor);
  };
  const auto wait_values = [&](int i) {
    barrier_wait(memory.full(1, i), memory.parity(i));
    clear_unseen<D>(memory.tile(1, i), range, range.first + i, rows_of_box);
  };

  barrier_wait(memory.full(0, 0), 0);
  start_scores<T, D>(scores, queries, memory.tile(0, 0));
  products_wait<0>();
  hold(scores);
  if (speaks) barrier_arrive(memory.empty(0, 0));
  weigh(0);
  round_weights<T>(weights, scores);
  for (int i = 0; i + 1 < range.count; ++i) {
    barrier_wait(memory.full(0, i + 1), memory.parity(i + 1));
    start_scores<T, D>(scores, queries, memory.tile(0, i + 1));
    wait_values(i);
    start_values<T, D>(softmax.out, weights, memory.tile(1, i));
    products_wait<1>();
    hold(scores);
    if (speaks) barrier_arrive(memory.empty(0, i + 1));
    weigh(i + 1);
    products_wait<0>(softmax.sum[0] + softmax.sum[1]);  // weights beside the products
    hold(softmax.out);
    if (speaks) barrier_arrive(memory.empty(1, i));
    softmax.scale(factor);
    round_weights<T>(weights, scores);
  }
  wait_values(range.count - 1);
  start_values<T, D>(softmax.out, weights, memory.tile(1, range.count - 1));
  products_wait<0>();
  hold(softmax.out);
  softmax.finish();
  store_rows<T, D>(p, own, softmax, row, rows);
}

// Grid: (row tiles or more, num_kv_heads). Threads: a warpgroup of which one warp copies, two that compute 64 rows each.
// Shared memory: two stages of 128 keys and of their values. Bits: as prefill_kernel's, not the same as its.
template <class T, int D>
__global__ void __launch_bounds__(Sm90Shape<D>::kThreads, 1) prefill_sm90_kernel(const __grid_constant__ Sm90Params p) {
  using Shape = Sm90Shape<D>;
  const Work work = find_work(p.attention.num_seqs, blockIdx.x, [&](int seq) {
    return prefill_tiles(p.attention, seq, Shape::kRows);
  });
  if (work.seq < 0) return;
  const Sm90Memory<D> memory(shared_memory());
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * Shape::kStages; ++i) {
      barrier_init(memory.barriers + i, 1);
      barrier_init(memory.barriers + 2 * Shape::kStages + i, Shape::kGroups * 4);
    }
    barrier_init_fence();
  }
  __syncthreads();

  const Sequence<T> own(p.attention, work.seq, blockIdx.y);
  const int group = p.attention.group, rows = own.num_tokens * group;
  const int first_row = (prefill_tiles(p.attention, work.seq, Shape::kRows) - 1 - work.item) * Shape::kRows;
  const int first_position = own.position(first_row, group);
  const int last_position = min(own.position(first_row + Shape::kRows - 1, group), own.length - 1);
  Sm90Range range;
  range.from = p.attention.window ? max(0, first_position - p.attention.window + 1) : 0;
  range.to = last_position + 1;
  range.first = range.from / Shape::kKeys;
  range.count = (range.to + Shape::kKeys - 1) / Shape::kKeys - range.first;

  if (threadIdx.x < 128) {
    fewer_registers<24>();
    if (threadIdx.x < 32) copy_tiles<T, D>(p, own, range, memory);
  } else {
    more_registers<240>();
    attend_tiles<T, D>(p, own, range, memory, first_row, first_position, last_position, rows);
  }
}

}  // namespace cuda_ops
