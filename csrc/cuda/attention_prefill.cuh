// Attention of sequences with more than one new token: FlashAttention-2 (arXiv 2307.08691) over the paged cache, on the
// tensor cores that every GPU from sm_80 on has.
#pragma once

#include "attention.cuh"

namespace cuda_ops {

template <int D> struct PrefillShape {
  static constexpr int kWarps = D <= 128 ? 8 : 4;
  static constexpr int kRows = kWarps * 16;
  static constexpr int kKeys = D <= 128 ? 64 : 32;  // of a tile
  static constexpr int kStride = D + 8;
  static constexpr int kStageValues = 2 * kKeys * kStride;
  static constexpr int kSharedBytes = 2 * kStageValues * 2;  // two stages
};

// Grid: (row tiles or more, num_kv_heads). Threads: a warp for each 16 rows. Shared memory: two stages of keys and
// values. Tiles of keys lie at fixed positions and are taken in order, so a token's bits depend neither on the batch nor
// on where its prompt was cut. Operations: 4 * D for every visible pair of query and key, and those hidden in a tile.
template <class T, int D>
__global__ void __launch_bounds__(PrefillShape<D>::kWarps * 32) prefill_kernel(AttentionParams p) {
  using Shape = PrefillShape<D>;
  constexpr int kKeys = Shape::kKeys, kTiles = kKeys / 8;
  T* stages = reinterpret_cast<T*>(shared_memory());
  const int lane = threadIdx.x % 32;
  const Work work =
      find_work(p.num_seqs, blockIdx.x, [&](int seq) { return prefill_tiles(p, seq, Shape::kRows); });
  if (work.seq < 0) return;
  const Sequence<T> own(p, work.seq, blockIdx.y);
  const int rows = own.num_tokens * p.group;
  // The last rows see most keys: they start first.
  const int first_row = (prefill_tiles(p, work.seq, Shape::kRows) - 1 - work.item) * Shape::kRows;
  const int row = first_row + static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;

  uint32_t queries[D / 16][4];
  load_queries<T, D>(queries, p, own, row, rows);
  Softmax<D> softmax;
  softmax.clear();
  const int position[2] = {own.position(row, p.group), own.position(row + 8, p.group)};
  const int first_position = own.position(first_row, p.group);
  const int last_position = min(own.position(first_row + Shape::kRows - 1, p.group), own.length - 1);
  const int from = p.window ? max(0, first_position - p.window + 1) : 0, to = last_position + 1;

  const auto start_copy = [&](int tile) {
    T* stage = stages + tile % 2 * Shape::kStageValues;
    for (int piece = threadIdx.x; piece < kKeys * (D / 8); piece += Shape::kWarps * 32) {
      const int r = piece / (D / 8), column = piece % (D / 8) * 8, key = tile * kKeys + r;
      const bool valid = key >= from && key < to;
      const int64_t at = valid ? own.key_at(p, key, D) + column : 0;
      copy_async(stage + r * Shape::kStride + column, static_cast<const T*>(p.k_cache) + at, valid);
      copy_async(stage + (kKeys + r) * Shape::kStride + column, static_cast<const T*>(p.v_cache) + at, valid);
    }
    copy_commit();
  };
  const int last_tile = (to + kKeys - 1) / kKeys;
  int tile = from / kKeys;
  start_copy(tile);
  for (; tile < last_tile; ++tile) {
    copy_wait<0>();
    __syncthreads();  // all threads' copies have landed, and all have read the stage that is filled next
    if (tile + 1 < last_tile) start_copy(tile + 1);
    const T* keys = stages + tile % 2 * Shape::kStageValues;
    float scores[kTiles][4];
    multiply_keys<T, D, kTiles>(scores, queries, keys, Shape::kStride);
    const bool hide = (tile + 1) * kKeys > first_position + 1 ||
                      (p.window && tile * kKeys <= last_position - p.window);
    mask(scores, p, tile * kKeys + lane % 4 * 2, position, hide);
    softmax.take(scores);
    multiply_values<T, D, kTiles>(softmax.out, scores, keys + kKeys * Shape::kStride, Shape::kStride);
  }

  softmax.finish();
  store_rows<T, D>(p, own, softmax, row, rows);
}

}  // namespace cuda_ops
