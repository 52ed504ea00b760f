#include "attention_prefill.cuh"

#include "attention_launch.h"

namespace cuda_ops {

void launch_prefill_coded(ScalarType type, int head_dim, int64_t num_tokens, const Place& place,
                          const AttentionParams& params) {
  with_half(type, "q", [&]<class Tagged>(Tagged) {
    with_head_dim(head_dim, [&](auto size) {
      using Shape = PrefillShape<size.value, true>;
      const int64_t tiles = ceil_div(num_tokens * params.group, Shape::kRows) + params.num_seqs;
      const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(params.num_kv_heads));
      launch(prefill_kernel<typename Tagged::type, size.value, true>, grid, dim3(Shape::kThreads),
             Shape::kSharedBytes, place, params);
    });
  });
}

}  // namespace cuda_ops
