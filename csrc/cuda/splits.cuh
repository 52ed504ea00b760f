// Sums of products whose columns are split over blocks of threads.
#pragma once

#include <primitives.cuh>

namespace cuda_ops {

// Where the sums of a tile of tokens and 128 output features go.
struct SplitSums {
  void* partial;  // [splits, num_tokens, padded_out] of 32 bits, unused for one split
  int* arrived;   // of this tile: zero before and after
  int splits, split, num_tokens, padded_out, out_features;
  int first_token, tokens, first_row;  // of the tile
};

// Calls store(token of the tile, output feature, sum) for each; the last of the splits to arrive adds up what all of them
// wrote, in order of their columns. tile: [tokens, stride] in shared memory; is_last: 4 bytes there. Of `threads` threads,
// all of which call this, thread is one; sync() is their barrier.
template <class Sum, class Sync, class Store>
__device__ __forceinline__ void store_sums(const SplitSums& p, const Sum* tile, int stride, int* is_last, int thread,
                                           int threads, const Sync& sync, const Store& store) {
  constexpr int kRows = 128;
  const int64_t step = static_cast<int64_t>(p.num_tokens) * p.padded_out;
  Sum* partial = static_cast<Sum*>(p.partial) + static_cast<int64_t>(p.first_token) * p.padded_out;
  for (int i = thread; i < p.tokens * kRows; i += threads) {
    const int token = i / kRows, row = p.first_row + i % kRows;
    const Sum sum = tile[token * stride + i % kRows];
    if (p.splits > 1) partial[p.split * step + static_cast<int64_t>(token) * p.padded_out + row] = sum;
    else if (row < p.out_features) store(token, row, sum);
  }
  if (p.splits == 1) return;
  fence();
  sync();
  if (thread == 0) *is_last = atomic_add(p.arrived, 1) == p.splits - 1;
  sync();
  if (!*is_last) return;
  fence();
  for (int i = thread; i < p.tokens * kRows; i += threads) {
    const int token = i / kRows, row = p.first_row + i % kRows;
    if (row >= p.out_features) continue;
    Sum sum = 0;
    for (int s = 0; s < p.splits; ++s)
      sum += load_shared_by_blocks(partial + s * step + static_cast<int64_t>(token) * p.padded_out + row);
    store(token, row, sum);
  }
  if (thread == 0) *p.arrived = 0;
}

}  // namespace cuda_ops
