// The op linear_fp8: checks, inputs rounded to E4M3, splits and launch. On sm_90a alone.

#include "linear_fp8.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "product.h"
#include "quantize.cuh"
#include "tensors.h"

namespace cuda_ops {
namespace {

constexpr int kLeastChunks = 4;  // of a split: 512 columns

// Whether linear_fp8 runs where a tensor is.
bool has_linear_fp8(const Tensor& like) {
#ifdef CUDA_OPS_SM90
  return compute_capability(like.get_device_index()) == 90;
#else
  return false;
#endif
}

// x as E4M3, in `codes`, by scales that p gets.
void quantize(const Tensor& x, bool blocks, const std::optional<Tensor>& input_scale, const Tensor& codes,
              const Tensor& scales, const Place& place, Fp8Params& p) {
  const float* one = input_scale ? data<float>(*input_scale) : nullptr;
  const QuantizeParams own{x.const_data_ptr(), one, static_cast<unsigned char*>(codes.mutable_data_ptr()),
                           mutable_data<float>(scales), x.stride(0), static_cast<int>(x.size(1)),
                           static_cast<int>(x.size(1)), p.scales_stride};
  with_half(x.scalar_type(), "x", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    const dim3 grid(static_cast<unsigned>(p.num_tokens));
    if (blocks) return launch(quantize_tiles_kernel<T>, grid, dim3(kQuantizeThreads), 0, place, own);
    launch(quantize_rows_kernel<T, true>, grid, dim3(kQuantizeThreads), kQuantizeThreads / 32 * sizeof(float), place, own);
  });
  p.one_x_scale = one != nullptr && !blocks;
  p.x_scales = p.one_x_scale ? one : data<float>(scales);
}

// codes: [out_features, in_features] uint8, E4M3. scales: [ceil(out_features / 128), in_features / 128] float32, then inputs
// have a scale for each token and 128 columns; or [out_features], then one for each token. input_scale: one float32 in
// place of these. arrived: int32 zeros; zeros again afterwards.
Tensor linear_fp8(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& input_scale, const Tensor& arrived) {
  STD_TORCH_CHECK(has_linear_fp8(x), "x: on a device without sm_90a kernels; dequantize the weight");
  check_dense_rows(x, 2, "x");
  const int64_t tokens = x.size(0), in_features = x.size(1), chunks = in_features / kFp8Columns;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.dim() == 2 && codes.is_contiguous() &&
                      codes.size(1) == in_features && divides_16(codes), "codes: expected [out_features, ", in_features,
                  "] uint8, contiguous");
  const int64_t out_features = codes.size(0), row_tiles = ceil_div(out_features, kFp8Rows);
  const bool blocks = scales.dim() == 2;
  STD_TORCH_CHECK(in_features % kFp8Columns == 0, "x: ", in_features, " columns; expected a multiple of ", kFp8Columns);
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous(), "scales: expected float32, contiguous");
  check_size(scales, 0, blocks ? row_tiles : out_features, "scales");
  if (blocks) check_size(scales, 1, chunks, "scales");
  STD_TORCH_CHECK(divides_16(x) && (tokens <= 1 || x.stride(0) % 8 == 0),
                  "x: expected rows at addresses that 16 divides; call clone()");
  if (bias) {
    check_like(*bias, x, "bias", "x");
    check_vector(*bias, out_features, "bias");
  }
  if (input_scale)
    STD_TORCH_CHECK(input_scale->scalar_type() == ScalarType::Float && input_scale->numel() == 1,
                    "input_scale: expected one float32");
  Tensor out = torch::stable::new_empty(x, {tokens, out_features});
  if (tokens == 0) return out;
  const Place place(x.get_device_index());
  const int tile = product_tile<16, 64, 128>(tokens);
  const int64_t tiles = ceil_div(tokens, tile);
  const int64_t wanted = std::clamp<int64_t>(ceil_div(multiprocessors(place.device), row_tiles), 1,
                                             std::max<int64_t>(1, chunks / kLeastChunks));
  Fp8Params p{};
  p.chunks_of_split = static_cast<int>(ceil_div(chunks, wanted));
  p.splits = static_cast<int>(ceil_div(chunks, p.chunks_of_split));
  STD_TORCH_CHECK(arrived.scalar_type() == ScalarType::Int && arrived.is_contiguous() &&
                      arrived.numel() >= row_tiles * tiles, "arrived: expected at least ", row_tiles * tiles, " int32");
  p.num_tokens = static_cast<int>(tokens);
  p.out_features = static_cast<int>(out_features);
  p.padded_out = static_cast<int>(row_tiles * kFp8Rows);
  p.num_chunks = static_cast<int>(chunks);
  p.scales_stride = static_cast<int>(tiles * tile);
  Tensor rounded = torch::stable::new_empty(x, {tokens, in_features}, ScalarType::Byte);
  Tensor x_scales = torch::stable::new_empty(x, {blocks ? chunks * p.scales_stride : tokens}, ScalarType::Float);
  quantize(x, blocks, input_scale, rounded, x_scales, place, p);
  Tensor partial =
      torch::stable::new_empty(x, {p.splits > 1 ? p.splits * tokens * p.padded_out : 0}, ScalarType::Float);
  p.scales = data<float>(scales);
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  p.partial = partial.mutable_data_ptr();
  p.arrived = mutable_data<int32_t>(arrived);
#ifdef CUDA_OPS_SM90
  launch_fp8_sm90(x.scalar_type(), tile, blocks, codes.const_data_ptr(), rounded.const_data_ptr(), in_features, place, p);
#endif
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def("has_linear_fp8(Tensor like) -> bool");
  library.def(
      "linear_fp8(Tensor x, Tensor codes, Tensor scales, Tensor? bias, Tensor? input_scale, Tensor(a!) arrived) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("has_linear_fp8", TORCH_BOX(&has_linear_fp8));
  library.impl("linear_fp8", TORCH_BOX(&linear_fp8));
}

}  // namespace cuda_ops
