// Products whose columns are split over blocks of threads, on the host's side.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "tensors.h"

namespace cuda_ops {

// What splits of a product's columns cost, in chunks of a block of threads.
struct SplitCosts {
  int least;     // chunks of a split
  int resident;  // blocks that a multiprocessor needs to keep its memory busy: fewer take as long
  int sums;      // what writing the sums of a split takes, and reading them
};

// Sets splits and chunks_of_split of a product's parameters, so that the multiprocessor with most blocks has least to do.
// They depend on the weight's shape and the device alone.
template <class Params> void split_columns(Params& p, int64_t row_tiles, const SplitCosts& costs, const Place& place) {
  const int64_t chunks = p.num_chunks, count = multiprocessors(place.device);
  int64_t best = 0;
  for (int64_t wanted = 1; wanted <= std::max<int64_t>(1, chunks / costs.least); ++wanted) {
    const int64_t own = ceil_div(chunks, wanted), splits = ceil_div(chunks, own);
    const int64_t blocks = std::max<int64_t>(ceil_div(row_tiles * splits, count), costs.resident);
    const int64_t cost = splits > 1 ? blocks * (own + costs.sums) + costs.sums * splits : blocks * own;
    if (best && cost >= best) continue;
    best = cost;
    p.chunks_of_split = static_cast<int>(own);
    p.splits = static_cast<int>(splits);
  }
}

// Whether blocks that take all splits of a tile one after the other, and add up their sums as the splits' own blocks would,
// are sooner done. The bits are the same, so this may depend on the batch: tiles are of its tokens too.
template <class Params>
bool one_block_sums(const Params& p, int64_t tiles, const SplitCosts& costs, const Place& place) {
  const int64_t count = multiprocessors(place.device);
  const int64_t apart = std::max<int64_t>(ceil_div(tiles * p.splits, count), costs.resident);
  const int64_t together = std::max<int64_t>(ceil_div(tiles, count), costs.resident);
  return together * p.num_chunks <= apart * (p.chunks_of_split + costs.sums) + costs.sums * p.splits;
}

// Tokens of a launch, of `tokens`: all of a product that is not split, else so many that their sums nearly stay in the
// second-level cache, and do not grow with the tokens. A multiple of every tile.
template <class Params> int64_t tokens_of_launch(const Params& p, int64_t tokens) {
  return p.splits > p.splits_of_block ? std::min<int64_t>(tokens, 1024) : tokens;
}

// Room for the sums of all splits, of 32 bits, of token_tiles of `tile` tokens; empty where a block has all splits. Sets
// partial and arrived, which such a block has no use for: a product of many rows and tokens has more tiles than there are
// counters.
template <class Params>
Tensor sums_of_splits(Params& p, int64_t row_tiles, int64_t token_tiles, int tile, const Tensor& like,
                      const Tensor& arrived) {
  const bool apart = p.splits > p.splits_of_block;
  STD_TORCH_CHECK(!apart || (arrived.scalar_type() == ScalarType::Int && arrived.is_contiguous() &&
                             arrived.numel() >= row_tiles * token_tiles),
                  "arrived: expected at least ", row_tiles * token_tiles, " int32");
  const int64_t count = apart ? p.splits * token_tiles * tile * p.padded_out : 0;
  Tensor partial = torch::stable::new_empty(like, {count}, ScalarType::Int);
  p.partial = partial.mutable_data_ptr();
  p.arrived = mutable_data<int32_t>(arrived);
  return partial;
}

}  // namespace cuda_ops
