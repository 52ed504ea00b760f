// Attention of sequences with more than one new token: FlashAttention-2 (arXiv 2307.08691) over the paged cache, on the
// tensor cores that every GPU from sm_80 on has.
#pragma once

#include "attention.cuh"

namespace cuda_ops {

template <int D, bool CODED> struct PrefillShape {
  static constexpr int kWarps = D <= 128 ? 8 : 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRows = kWarps * 16;
  static constexpr int kKeys = D <= 128 ? 64 : CODED ? 16 : 32;  // of a tile
  static constexpr int kStride = D + 8;
  static constexpr int kStageValues = 2 * kKeys * kStride;
  static constexpr int kCodedBytes = 2 * kKeys * (D + 8);  // a stage of codes: rows of D bytes, then scales and offsets
  static constexpr int kSharedBytes = CODED ? kStageValues * 2 + 2 * kCodedBytes : 2 * kStageValues * 2;
};

// Starts the copy of a tile's codes and scales; those of rows outside [from, to) are zeros. All threads.
template <class T, int D>
__device__ __forceinline__ void copy_coded_tile(unsigned char* stage, const AttentionParams& p, const Sequence<T>& own,
                                                int tile, int from, int to) {
  using Shape = PrefillShape<D, true>;
  constexpr int kKeys = Shape::kKeys;
  const int width = kv_width(p.form, D), step = width % 16 ? 8 : 16, pieces = width / step;
#pragma unroll 1
  for (int piece = threadIdx.x; piece < kKeys * pieces; piece += Shape::kThreads) {
    const int r = piece / pieces, column = piece % pieces * step, key = tile * kKeys + r;
    const bool valid = key >= from && key < to;
    const int64_t at = valid ? own.slot_at(p, key) * width + column : 0;
    const void* froms[2] = {static_cast<const unsigned char*>(p.k_cache) + at,
                            static_cast<const unsigned char*>(p.v_cache) + at};
#pragma unroll
    for (int what = 0; what < 2; ++what) {
      unsigned char* to_row = stage + (what * kKeys + r) * D + column;
      if (step == 16) copy_async(to_row, froms[what], valid);
      else copy_async_short<8>(to_row, froms[what], valid);
    }
  }
  if (threadIdx.x < 2 * kKeys) {
    const int key = tile * kKeys + threadIdx.x % kKeys;
    const bool valid = key >= from && key < to;
    const float* scales = threadIdx.x < kKeys ? p.k_scales : p.v_scales;
    const int64_t at = valid ? own.slot_at(p, key) * kv_numbers(p.form) : 0;
    unsigned char* to_scale = stage + 2 * kKeys * D + threadIdx.x * 8;
    if (p.form == Form::fp8) copy_async_short<4>(to_scale, scales + at, valid);
    else copy_async_short<8>(to_scale, scales + at, valid);
  }
}

// Numbers of a stage's codes, rounded to T: keys, then values, kStride a row. All threads.
template <class T, int D>
__device__ __forceinline__ void unpack_tile(T* to, const unsigned char* stage, Form form) {
  using Shape = PrefillShape<D, true>;
  constexpr int kRows = 2 * Shape::kKeys;
#pragma unroll 1
  for (int piece = threadIdx.x; piece < kRows * (D / 8); piece += Shape::kThreads) {
    const int r = piece / (D / 8), column = piece % (D / 8) * 8;
    const float* by = reinterpret_cast<const float*>(stage + kRows * D + r * 8);
    const unsigned char* codes = stage + r * D + (form == Form::int4 ? column / 2 : column);
    uint32_t words[2] = {*reinterpret_cast<const uint32_t*>(codes), 0};
    if (form != Form::int4) words[1] = *reinterpret_cast<const uint32_t*>(codes + 4);
    const float scale = by[0], offset = form == Form::fp8 ? 0.0f : by[1];
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int n = 2 * i + j;
        const uint32_t byte = words[n / 4] >> n % 4 * 8 & 0xFF;
        if (form == Form::int4) x[j] = static_cast<float>(words[0] >> 4 * n & 15);
        else if (form == Form::int8) x[j] = static_cast<float>(byte);
        else x[j] = from_e4m3(byte);
        x[j] = x[j] * scale + offset;
      }
      pairs[i] = pack<T>(x[0], x[1]);
    }
    *reinterpret_cast<uint4*>(to + r * Shape::kStride + column) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

// Grid: (row tiles or more, num_kv_heads). Threads: a warp for each 16 rows. Shared memory: two stages of keys and
// values; CODED: two stages of their codes, and one tile of the numbers that they stand for. Tiles of keys lie at fixed positions and are taken in order, so a token's bits depend neither on the batch nor
// on where its prompt was cut. Operations: 4 * D for every visible pair of query and key, and those hidden in a tile.
template <class T, int D, bool CODED>
__global__ void __launch_bounds__(PrefillShape<D, CODED>::kThreads) prefill_kernel(AttentionParams p) {
  using Shape = PrefillShape<D, CODED>;
  constexpr int kKeys = Shape::kKeys, kTiles = kKeys / 8;
  T* stages = reinterpret_cast<T*>(shared_memory());
  unsigned char* coded_stages = shared_memory() + Shape::kStageValues * 2;
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
    if constexpr (CODED) {
      copy_coded_tile<T, D>(coded_stages + tile % 2 * Shape::kCodedBytes, p, own, tile, from, to);
      return copy_commit();
    }
    T* stage = stages + tile % 2 * Shape::kStageValues;
    for (int piece = threadIdx.x; piece < kKeys * (D / 8); piece += Shape::kThreads) {
      const int r = piece / (D / 8), column = piece % (D / 8) * 8, key = tile * kKeys + r;
      const bool valid = key >= from && key < to;
      const int64_t at = valid ? own.slot_at(p, key) * D + column : 0;
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
    const T* keys = stages + (CODED ? 0 : tile % 2 * Shape::kStageValues);
    if constexpr (CODED) {
      unpack_tile<T, D>(stages, coded_stages + tile % 2 * Shape::kCodedBytes, p.form);
      __syncthreads();  // all threads' numbers are there
    }
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
