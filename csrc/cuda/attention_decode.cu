#include "attention_decode.cuh"

#include "attention_launch.h"

namespace cuda_ops {

void launch_decode(ScalarType type, int head_dim, int grid_x, const Place& place, const AttentionParams& params) {
  with_half(type, "q", [&]<class Tagged>(Tagged) {
    with_head_dim(head_dim, [&](auto size) {
      using Tile = PlainTile<typename Tagged::type, size.value>;
      using Shape = DecodeShape<Tile>;
      const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(params.num_kv_heads * params.row_tiles));
      launch(decode_kernel<Tile>, grid, dim3(Shape::kWarps * 32), Shape::kSharedBytes, place, params);
    });
  });
}

}  // namespace cuda_ops
