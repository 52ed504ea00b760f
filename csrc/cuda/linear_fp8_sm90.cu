#include "linear_fp8_sm90.cuh"

#include "tensors.h"

namespace cuda_ops {
namespace {

template <class T, int TOKENS, bool BLOCKS, bool WALKS = false>
void run(const void* codes, const void* x, int64_t in_features, const Place& place, const Fp8Params& params) {
  using Shape = Fp8Shape<TOKENS>;
  const auto map = [&](const void* data, int64_t rows, uint32_t rows_of_box) {
    const uint64_t bytes = static_cast<uint64_t>(in_features), all = bytes * static_cast<uint64_t>(rows);
    return tensor_map(data, {bytes / 2, static_cast<uint64_t>(rows), 1, 1}, {bytes, all, all}, {64, rows_of_box, 1, 1});
  };
  const Fp8Sm90Params p{params, map(codes, params.out_features, kFp8Rows), map(x, params.num_tokens, TOKENS)};
  const dim3 grid(static_cast<unsigned>(ceil_div(params.num_tokens, TOKENS)),
                  static_cast<unsigned>(params.padded_out / kFp8Rows),
                  static_cast<unsigned>(WALKS ? 1 : params.splits));
  launch(fp8_sm90_kernel<T, TOKENS, BLOCKS, WALKS>, grid, dim3(Shape::kThreads), Shape::kSharedBytes, place, p);
}

}  // namespace

void launch_fp8_sm90(ScalarType type, int tile, bool blocks, const void* codes, const void* x, int64_t in_features,
                     const Place& place, const Fp8Params& params) {
  with_half(type, "x", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    const auto with_tile = [&](auto tokens) {
      if (blocks) return run<T, tokens.value, true>(codes, x, in_features, place, params);
      run<T, tokens.value, false>(codes, x, in_features, place, params);
    };
    if (params.splits_of_block > 1) {
      if (blocks) return run<T, kFp8LargestTile, true, true>(codes, x, in_features, place, params);
      return run<T, kFp8LargestTile, false, true>(codes, x, in_features, place, params);
    }
    if (tile == 16) return with_tile(std::integral_constant<int, 16>{});
    if (tile == 64) return with_tile(std::integral_constant<int, 64>{});
    with_tile(std::integral_constant<int, kFp8LargestTile>{});
  });
}

}  // namespace cuda_ops
