#include "attention_prefill_sm90.cuh"

#include "attention_launch.h"

namespace cuda_ops {
namespace {

template <class T, int D>
void run(int64_t num_blocks, int64_t num_tokens, const Place& place, const AttentionParams& params) {
  using Shape = Sm90Shape<D>;
  const uint64_t block_size = uint64_t{1} << params.block_shift, heads = static_cast<uint64_t>(params.num_kv_heads);
  const uint64_t sizes[4] = {D, block_size, heads, static_cast<uint64_t>(num_blocks)};
  const uint64_t strides[3] = {D * 2, block_size * D * 2, heads * block_size * D * 2};
  const uint32_t box[4] = {64, static_cast<uint32_t>(std::min<uint64_t>(block_size, Shape::kKeys)), 1, 1};
  const Sm90Params p{params, tensor_map(params.k_cache, sizes, strides, box),
                     tensor_map(params.v_cache, sizes, strides, box)};
  const int64_t tiles = ceil_div(num_tokens * params.group, Shape::kRows) + params.num_seqs;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(params.num_kv_heads));
  launch(prefill_sm90_kernel<T, D>, grid, dim3(Shape::kThreads), Shape::kSharedBytes, place, p);
}

}  // namespace

void launch_prefill_sm90(ScalarType type, int head_dim, int64_t num_blocks, int64_t num_tokens, const Place& place,
                         const AttentionParams& params) {
  with_half(type, "q", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    if (head_dim == 64) return run<T, 64>(num_blocks, num_tokens, place, params);
    run<T, 128>(num_blocks, num_tokens, place, params);
  });
}

}  // namespace cuda_ops
