// The op linear_fp8: checks, splits and launch. On sm_90a alone.

#include "linear_fp8.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "splits.h"

namespace cuda_ops {
namespace {

constexpr SplitCosts kCosts{4, 1, 2};  // splits of 512 columns or more

// Whether linear_fp8 runs where a tensor is.
bool has_linear_fp8(const Tensor& like) {
#ifdef CUDA_OPS_SM90
  return compute_capability(like.get_device_index()) == 90;
#else
  return false;
#endif
}

// x: [num_tokens, in_features] uint8, E4M3, as the op quantize makes it. codes: [out_features, in_features], the same. scales:
// [ceil(out_features / 128), in_features / 128] float32, and then x_scales [in_features / 128, at least num_tokens in whole
// tiles]; or [out_features], and x_scales [num_tokens]. arrived: int32 zeros; zeros again afterwards.
void linear_fp8(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& bias,
                const Tensor& x_scales, const Tensor& arrived, const Tensor& out) {
  STD_TORCH_CHECK(has_linear_fp8(x), "x: on a device without sm_90a kernels; dequantize the weight");
  const int64_t tokens = x.size(0), in_features = x.size(1), chunks = in_features / kFp8Columns;
  for (const auto& [factor, name] : {std::pair{&x, "x"}, {&codes, "codes"}})
    STD_TORCH_CHECK(factor->scalar_type() == ScalarType::Byte && factor->dim() == 2 && factor->is_contiguous() &&
                        factor->size(1) == in_features && divides_16(*factor), name, ": expected [rows, ", in_features,
                    "] uint8, contiguous");
  const int64_t out_features = codes.size(0), row_tiles = ceil_div(out_features, kFp8Rows);
  const bool blocks = scales.dim() == 2;
  STD_TORCH_CHECK(in_features % kFp8Columns == 0, "x: ", in_features, " columns; expected a multiple of ", kFp8Columns);
  for (const Tensor* own : {&scales, &x_scales})
    STD_TORCH_CHECK(own->scalar_type() == ScalarType::Float && own->is_contiguous(), "scales: expected float32, contiguous");
  check_size(scales, 0, blocks ? row_tiles : out_features, "scales");
  check_size(x_scales, 0, blocks ? chunks : tokens, "x_scales");
  if (blocks) check_size(scales, 1, chunks, "scales");
  if (bias) {
    check_like(*bias, out, "bias", "out");
    check_vector(*bias, out_features, "bias");
  }
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.size(0) == tokens && out.size(1) == out_features,
                  "out: expected [", tokens, ", ", out_features, "], contiguous");
  if (tokens == 0) return;
  const Place place(x.get_device_index());
  const int tile = fp8_tile(tokens);
  const int64_t tiles = ceil_div(tokens, tile);
  Fp8Params p{};
  if (blocks) {
    STD_TORCH_CHECK(x_scales.dim() == 2 && x_scales.size(1) >= tiles * tile, "x_scales: expected room for ",
                    tiles * tile, " tokens");
    p.scales_stride = static_cast<int>(x_scales.size(1));
  }
  p.num_tokens = static_cast<int>(tokens);
  p.out_features = static_cast<int>(out_features);
  p.padded_out = static_cast<int>(row_tiles * kFp8Rows);
  p.num_chunks = static_cast<int>(chunks);
  p.scales = data<float>(scales);
  p.x_scales = data<float>(x_scales);
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  split_columns(p, row_tiles, kCosts, place);
  const bool together = tile == kFp8LargestTile && one_block_sums(p, row_tiles * tiles, kCosts, place);
  p.splits_of_block = together ? p.splits : 1;
  const int64_t most = tokens_of_launch(p, tokens);
  p.num_tokens = static_cast<int>(most);
  const Tensor partial = sums_of_splits(p, row_tiles, ceil_div(most, tile), tile, x, arrived);
#ifdef CUDA_OPS_SM90
  for (int64_t begin = 0; begin < tokens; begin += most) {
    Fp8Params part = p;
    part.num_tokens = static_cast<int>(std::min(most, tokens - begin));
    part.x_scales = p.x_scales + begin;
    part.out = static_cast<unsigned char*>(p.out) + begin * out_features * 2;
    launch_fp8_sm90(out.scalar_type(), tile, blocks, codes.const_data_ptr(), data<unsigned char>(x) + begin * in_features,
                    in_features, place, part);
  }
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def("has_linear_fp8(Tensor like) -> bool");
  library.def(
      "linear_fp8(Tensor x, Tensor codes, Tensor scales, Tensor? bias, Tensor x_scales, Tensor(a!) arrived, "
      "Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("has_linear_fp8", TORCH_BOX(&has_linear_fp8));
  library.impl("linear_fp8", TORCH_BOX(&linear_fp8));
}

}  // namespace cuda_ops
