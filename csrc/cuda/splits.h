// Products whose columns are split over blocks of threads, on the host's side.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "tensors.h"

namespace cuda_ops {

// Sets splits and chunks_of_split of a product's parameters: as many as fill the device, of at least `least` of
// its chunks of columns. They depend on the weight's shape and the device alone.
template <class Params> void split_columns(Params& p, int64_t row_tiles, int least, const Place& place) {
  const int64_t chunks = p.num_chunks, most = std::max<int64_t>(1, chunks / least);
  const int64_t wanted = std::clamp<int64_t>(ceil_div(multiprocessors(place.device), row_tiles), 1, most);
  p.chunks_of_split = static_cast<int>(ceil_div(chunks, wanted));
  p.splits = static_cast<int>(ceil_div(chunks, p.chunks_of_split));
}

// Tokens of a launch, of `tokens`: all of a product that is not split, else so many that their sums nearly stay in the
// second-level cache, and do not grow with the tokens. A multiple of every tile.
template <class Params> int64_t tokens_of_launch(const Params& p, int64_t tokens) {
  return p.splits > 1 ? std::min<int64_t>(tokens, 1024) : tokens;
}

// Room for the sums of all splits of p.num_tokens, of 32 bits; empty for one split. Sets partial and arrived, which one
// split has no use for: a product of many rows and tokens has more tiles than there are counters.
template <class Params> Tensor sums_of_splits(Params& p, int64_t tiles, const Tensor& like, const Tensor& arrived) {
  STD_TORCH_CHECK(p.splits == 1 || (arrived.scalar_type() == ScalarType::Int && arrived.is_contiguous() &&
                                    arrived.numel() >= tiles),
                  "arrived: expected at least ", tiles, " int32");
  const int64_t count = p.splits > 1 ? p.splits * int64_t{p.num_tokens} * p.padded_out : 0;
  Tensor partial = torch::stable::new_empty(like, {count}, ScalarType::Int);
  p.partial = partial.mutable_data_ptr();
  p.arrived = mutable_data<int32_t>(arrived);
  return partial;
}

}  // namespace cuda_ops
