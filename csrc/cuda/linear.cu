// The ops linear and expert_linear: checks, splits and launch of products with weights that product_kernel streams.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>

#include "product.h"
#include "quantize.cuh"
#include "tensors.h"

namespace cuda_ops {
namespace {

constexpr int kLeastChunks = 8;  // of a split: 512 columns of 16-bit inputs

struct Format {
  ScalarType scales;
  int pieces, value_bytes;
  int (*tile)(int64_t tokens);
  void (*launch)(ScalarType, int, int, const Place&, const ProductParams&);
};

Format format_of(const std::string& name) {
  if (name == "w4 float16" || name == "w4 bfloat16")
    return {ScalarType::Int, 1, 2, product_tile<16, 32, 64>, launch_product_w4};
  if (name == "fp8") return {ScalarType::Float, 2, 2, product_tile<16, 64>, launch_product_fp8};
  if (name == "mxfp4") return {ScalarType::Byte, 1, 2, product_tile<16, 64>, launch_product_mxfp4};
  if (name == "dense") return {ScalarType::Float, 4, 2, product_tile<16, 64, 128>, launch_product_dense};
  STD_TORCH_CHECK(name == "int8", "weights: ", name, "; expected w4 float16, w4 bfloat16, fp8, mxfp4, dense or int8");
  return {ScalarType::Float, 4, 1, product_tile<16, 64, 128>, launch_product_int8};
}

// What all products have in common. scales: [experts, rows, padded_out], as ProductParams has them.
ProductParams params_of(const Tensor& x, const std::string& weights, const Format& format, const Tensor& codes,
                        const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, int64_t out_features) {
  check_dense_rows(x, 2, "x");
  const int64_t in_features = x.size(1), chunks = ceil_div(in_features * format.value_bytes, kChunkBytes);
  STD_TORCH_CHECK(codes.dim() == 6, "codes: ", codes.dim(), " dimensions; expected 6");
  const int64_t experts = codes.size(0), padded = codes.size(1) * 16;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Int && codes.is_contiguous() && codes.size(2) == chunks &&
                      codes.size(3) == format.pieces && codes.size(4) == 32 && codes.size(5) == 4 && divides_16(codes),
                  "codes: expected [experts, padded_out / 16, ", chunks, ", ", format.pieces,
                  ", 32, 4] int32, contiguous, for ", in_features, " columns");
  STD_TORCH_CHECK(padded == ceil_div(out_features, kProductRows) * kProductRows, "codes: ", padded,
                  " rows; expected ", out_features, " rounded up to a multiple of ", kProductRows);
  STD_TORCH_CHECK(in_features % 8 == 0 && divides_16(x) && (x.size(0) <= 1 || x.stride(0) % 8 == 0),
                  "x: expected rows of a multiple of 8 values at addresses that 16 divides; call clone()");
  ProductParams p{};
  if (scales) {
    STD_TORCH_CHECK(scales->scalar_type() == format.scales && scales->dim() == 3 && scales->is_contiguous() &&
                        scales->size(0) == experts && scales->size(2) == padded && divides_16(*scales),
                    "scales: expected [", experts, ", rows, ", padded, "], contiguous, of the format's type");
    p.scales = scales->const_data_ptr();
    p.scale_rows = static_cast<int>(scales->size(1));
  }
  STD_TORCH_CHECK((weights == "dense") == !scales, "scales: expected for all weights but dense");
  if (weights == "mxfp4") check_size(*scales, 1, 2 * chunks, "scales");
  if (weights == "int8") check_size(*scales, 1, 1, "scales");
  if (format.scales == ScalarType::Int) {
    p.group_size = static_cast<int>(in_features / std::max(1, p.scale_rows));
    STD_TORCH_CHECK(in_features % 64 == 0 && p.scale_rows * p.group_size == in_features && p.group_size % 32 == 0 &&
                        (p.group_size == 32 || p.group_size % 64 == 0), "scales: ", p.scale_rows, " groups of ",
                    in_features, " columns; expected groups of 32 or of a multiple of 64");
    p.scales_are_bf16 = weights == "w4 bfloat16";
  }
  if (weights == "fp8") {
    p.group_size = static_cast<int>(p.scale_rows == 1 ? chunks * 64 : in_features / std::max(1, p.scale_rows));
    STD_TORCH_CHECK(p.scale_rows == 1 || (p.scale_rows * p.group_size == in_features && p.group_size % 64 == 0),
                    "scales: ", p.scale_rows, " groups of ", in_features,
                    " columns; expected one, or groups of a multiple of 64");
  }
  if (bias) {
    check_like(*bias, x, "bias", "x");
    STD_TORCH_CHECK(bias->is_contiguous() && bias->dim() == 2 && bias->size(0) == experts &&
                        bias->size(1) == out_features, "bias: expected [", experts, ", ", out_features, "]");
    p.bias = bias->const_data_ptr();
  }
  p.x = x.const_data_ptr();
  p.codes = static_cast<const uint4*>(codes.const_data_ptr());
  p.x_stride = x.stride(0);
  p.num_tokens = static_cast<int>(x.size(0));
  p.in_features = static_cast<int>(in_features);
  p.out_features = static_cast<int>(out_features);
  p.padded_out = static_cast<int>(padded);
  p.num_chunks = static_cast<int>(chunks);
  p.splits = 1;
  p.chunks_of_split = p.num_chunks;
  p.slots_of_row = 1;
  return p;
}

// x rounded to 8-bit integers and its scales, which p takes in its place.
std::pair<Tensor, Tensor> quantize(const Tensor& x, const std::optional<Tensor>& input_scale, const Place& place,
                                   ProductParams& p) {
  const int64_t padded = p.num_chunks * int64_t{kChunkBytes};
  Tensor codes = torch::stable::new_empty(x, {p.num_tokens, padded}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(x, {input_scale ? 0 : p.num_tokens}, ScalarType::Float);
  if (input_scale)
    STD_TORCH_CHECK(input_scale->scalar_type() == ScalarType::Float && input_scale->numel() == 1,
                    "input_scale: expected one float32");
  const float* one = input_scale ? data<float>(*input_scale) : nullptr;
  const QuantizeParams own{p.x, one, static_cast<unsigned char*>(codes.mutable_data_ptr()), mutable_data<float>(scales),
                           p.x_stride, p.in_features, static_cast<int>(padded), 0};
  with_half(x.scalar_type(), "x", [&]<class Tagged>(Tagged) {
    launch(quantize_rows_kernel<typename Tagged::type, false>, dim3(static_cast<unsigned>(p.num_tokens)),
           dim3(kQuantizeThreads), kQuantizeThreads / 32 * sizeof(float), place, own);
  });
  p.x = codes.const_data_ptr();
  p.x_stride = padded;
  p.in_features = static_cast<int>(padded);
  p.x_scales = one ? one : data<float>(scales);
  p.one_x_scale = one != nullptr;
  return {codes, scales};
}

// codes: [1, padded_out / 16, chunks, pieces, 32, 4]; scales: [1, rows, padded_out]; bias: [1, out_features].
// input_scale: of int8 weights, a float32 that all inputs are divided by; null: each row has its own. arrived: int32
// zeros; zeros again afterwards.
Tensor linear(const Tensor& x, std::string weights, const Tensor& codes, const std::optional<Tensor>& scales,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& input_scale, const Tensor& arrived,
              int64_t out_features) {
  const Format format = format_of(weights);
  ProductParams p = params_of(x, weights, format, codes, scales, bias, out_features);
  STD_TORCH_CHECK(codes.size(0) == 1, "codes: ", codes.size(0), " weights; expected one");
  Tensor out = torch::stable::new_empty(x, {p.num_tokens, out_features});
  if (p.num_tokens == 0) return out;
  const Place place(x.get_device_index());
  std::optional<std::pair<Tensor, Tensor>> quantized;
  if (weights == "int8") quantized = quantize(x, input_scale, place, p);
  const int64_t row_tiles = p.padded_out / kProductRows;
  const int64_t wanted = std::clamp<int64_t>(ceil_div(multiprocessors(place.device), row_tiles), 1,
                                             std::max(1, p.num_chunks / kLeastChunks));
  p.chunks_of_split = static_cast<int>(ceil_div(p.num_chunks, wanted));
  p.splits = static_cast<int>(ceil_div(p.num_chunks, p.chunks_of_split));
  const int tile = format.tile(p.num_tokens);
  const int64_t tiles = ceil_div(p.num_tokens, tile);
  STD_TORCH_CHECK(arrived.scalar_type() == ScalarType::Int && arrived.is_contiguous() &&
                      arrived.numel() >= row_tiles * tiles, "arrived: expected at least ", row_tiles * tiles, " int32");
  Tensor partial =
      torch::stable::new_empty(x, {p.splits > 1 ? p.splits * int64_t{p.num_tokens} * p.padded_out : 0}, ScalarType::Int);
  p.out = out.mutable_data_ptr();
  p.partial = partial.mutable_data_ptr();
  p.arrived = mutable_data<int32_t>(arrived);
  format.launch(x.scalar_type(), tile, static_cast<int>(tiles), place, p);
  return out;
}

// Each slot's row by its expert's weight. slots: [tiles, tile], tile_experts: [tiles], as sort_slots makes them; slot s is
// row s / slots_of_row of x. Returns [num_slots, out_features]; rows of slots that no tile has are not written.
Tensor expert_linear(const Tensor& x, std::string weights, const Tensor& codes, const std::optional<Tensor>& scales,
                     const std::optional<Tensor>& bias, const Tensor& slots, const Tensor& tile_experts,
                     int64_t slots_of_row, int64_t out_features) {
  const Format format = format_of(weights);
  ProductParams p = params_of(x, weights, format, codes, scales, bias, out_features);
  STD_TORCH_CHECK(slots_of_row >= 1, "slots_of_row: ", slots_of_row, "; expected at least 1");
  Tensor out = torch::stable::new_empty(x, {p.num_tokens * slots_of_row, out_features});
  STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Int && slots.dim() == 2 && slots.is_contiguous(),
                  "slots: expected [tiles, tile] int32, contiguous");
  const int64_t tiles = slots.size(0);
  p.tile_experts = int32s(tile_experts, tiles, "tile_experts");
  p.slots = data<int32_t>(slots);
  p.slots_of_row = static_cast<int>(slots_of_row);
  if (p.num_tokens == 0) return out;
  const Place place(x.get_device_index());
  std::optional<std::pair<Tensor, Tensor>> quantized;
  if (weights == "int8") quantized = quantize(x, std::nullopt, place, p);
  p.out = out.mutable_data_ptr();
  format.launch(x.scalar_type(), static_cast<int>(slots.size(1)), static_cast<int>(tiles), place, p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def(
      "linear(Tensor x, str weights, Tensor codes, Tensor? scales, Tensor? bias, Tensor? input_scale, "
      "Tensor(a!) arrived, int out_features) -> Tensor");
  library.def(
      "expert_linear(Tensor x, str weights, Tensor codes, Tensor? scales, Tensor? bias, Tensor slots, "
      "Tensor tile_experts, int slots_of_row, int out_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("expert_linear", TORCH_BOX(&expert_linear));
}

}  // namespace cuda_ops
