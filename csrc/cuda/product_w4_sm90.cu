#include "product_sm90.cuh"
#include "tensors.h"

namespace cuda_ops {
namespace {

constexpr int kClusterBlocks = 2;  // that share their inputs

template <class T, int TOKENS, int GROUPS, bool WALKS>
void run(const dim3& grid, const Place& place, const ProductParams& p) {
  using Shape = ProductSm90Shape<TOKENS, WALKS>;
  const int blocks = grid.y % kClusterBlocks ? 1 : kClusterBlocks;
  const uint64_t chunk_rows = static_cast<uint64_t>(p.num_chunks) * 4, tiles = static_cast<uint64_t>(p.padded_out) / 16;
  const uint64_t columns = static_cast<uint64_t>(p.in_features), tokens = static_cast<uint64_t>(p.num_tokens);
  const uint64_t stride = p.num_tokens > 1 ? static_cast<uint64_t>(p.x_stride) * 2 : columns * 2;
  const ProductSm90Params params{
      p,
      tensor_map(p.codes, {64, chunk_rows, tiles, 1}, {128, chunk_rows * 128, tiles * chunk_rows * 128}, {64, 8, 8, 1}),
      tensor_map(p.x, {columns, tokens, 1, 1}, {stride, tokens * stride, tokens * stride},
                 {64, static_cast<uint32_t>(TOKENS / blocks), 1, 1})};
  launch_clusters(product_sm90_kernel<W4<T>, TOKENS, GROUPS, WALKS>, blocks, grid, dim3(Shape::kThreads), Shape::kSharedBytes,
                  place, params);
}

}  // namespace

void launch_product_w4_sm90(ScalarType type, int tile, int tiles, const Place& place, const ProductParams& p) {
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.padded_out / kProductRows),
                  static_cast<unsigned>(p.splits_of_block == 1 ? p.splits : 1));
  with_half(type, "x", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    const auto with = [&](auto tokens, auto walks) {
      if (p.group_size == 32) return run<T, tokens.value, 2, walks.value>(grid, place, p);
      run<T, tokens.value, 1, walks.value>(grid, place, p);
    };
    if (p.splits_of_block > 1) return with(std::integral_constant<int, 64>{}, std::true_type{});
    if (tile == 16) return with(std::integral_constant<int, 16>{}, std::false_type{});
    if (tile == 32) return with(std::integral_constant<int, 32>{}, std::false_type{});
    with(std::integral_constant<int, 64>{}, std::false_type{});
  });
}

}  // namespace cuda_ops
