// The ops linear and expert_linear: checks, splits and launch of products with weights that product_kernel streams.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>

#include "product.h"
#include "splits.h"

namespace cuda_ops {
namespace {

// A chunk of 4-bit weights is 4 KiB, of plain ones 16.
constexpr SplitCosts kSmallChunks{8, 2, 4}, kLargeChunks{8, 1, 2};
constexpr SplitCosts kSm90Chunks{8, 1, 2};
constexpr int kHalfBytes = 2;  // of a result

struct Format {
  ScalarType scales;
  int pieces, value_bytes;
  int (*tile)(int64_t tokens);
  void (*launch)(ScalarType, int, int, const Place&, const ProductParams&);
  SplitCosts costs = kSmallChunks;
  int walking_tile = 0;  // tokens of blocks that take all splits of a tile; 0: none do
};

Format format_of(const std::string& name) {
  if (name == "w4 float16" || name == "w4 bfloat16")
    return {ScalarType::Int, 1, 2, product_tile<16, 32, 64>, launch_product_w4};
  if (name == "fp8") return {ScalarType::Float, 2, 2, product_tile<16, 64>, launch_product_fp8};
  if (name == "mxfp4") return {ScalarType::Byte, 1, 2, product_tile<16, 64>, launch_product_mxfp4};
  if (name == "dense") return {ScalarType::Float, 4, 2, product_tile<16, 64, 128>, launch_product_dense, kLargeChunks};
  STD_TORCH_CHECK(name == "int8", "weights: ", name, "; expected w4 float16, w4 bfloat16, fp8, mxfp4, dense or int8");
  return {ScalarType::Float, 4, 1, product_tile<16, 64, 128>, launch_product_int8, kLargeChunks};
}

// The same, of `linear`. What decides is the device, not the batch: other kernels sum in another order.
Format linear_format_of(const std::string& name, const Place& place) {
  Format format = format_of(name);
#ifdef CUDA_OPS_SM90
  if (format.launch == launch_product_w4 && compute_capability(place.device) == 90) {
    format.launch = launch_product_w4_sm90;
    format.costs = kSm90Chunks;
    format.walking_tile = 64;
  }
#endif
  return format;
}

// What all products have in common. scales: [experts, rows, padded_out], as ProductParams has them. x of int8 weights: codes
// that the op quantize made, and x_scales [rows].
ProductParams params_of(const Tensor& x, const std::string& weights, const Format& format, const Tensor& codes,
                        const std::optional<Tensor>& scales, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& x_scales, const Tensor& out) {
  check_dense_rows(x, 2, "x");
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.get_device_index() == x.get_device_index() &&
                      x.scalar_type() == (weights == "int8" ? ScalarType::Char : out.scalar_type()),
                  "out: expected 2 dimensions, contiguous, the dtype of x, which is int8 for such weights");
  const int64_t in_features = x.size(1), out_features = out.size(1), chunks = ceil_div(in_features * format.value_bytes, kChunkBytes);
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
    check_like(*bias, out, "bias", "out");
    STD_TORCH_CHECK(bias->is_contiguous() && bias->dim() == 2 && bias->size(0) == experts &&
                        bias->size(1) == out_features, "bias: expected [", experts, ", ", out_features, "]");
    p.bias = bias->const_data_ptr();
  }
  if (weights == "int8") {
    STD_TORCH_CHECK(x_scales && x_scales->scalar_type() == ScalarType::Float, "x_scales: expected float32 with int8 x");
    check_vector(*x_scales, x.size(0), "x_scales");
    p.x_scales = data<float>(*x_scales);
  }
  p.x = x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.codes = static_cast<const uint4*>(codes.const_data_ptr());
  p.x_stride = x.stride(0);
  p.num_tokens = static_cast<int>(x.size(0));
  p.in_features = static_cast<int>(in_features);
  p.out_features = static_cast<int>(out_features);
  p.padded_out = static_cast<int>(padded);
  p.num_chunks = static_cast<int>(chunks);
  p.splits = p.splits_of_block = 1;
  p.chunks_of_split = p.num_chunks;
  p.slots_of_row = 1;
  return p;
}

// codes: [1, padded_out / 16, chunks, pieces, 32, 4]; scales: [1, rows, padded_out]; bias: [1, out_features]. arrived: int32
// zeros; zeros again afterwards.
void linear(const Tensor& x, std::string weights, const Tensor& codes, const std::optional<Tensor>& scales,
            const std::optional<Tensor>& bias, const std::optional<Tensor>& x_scales, const Tensor& arrived,
            const Tensor& out) {
  const Place place(x.get_device_index());
  const Format format = linear_format_of(weights, place);
  ProductParams p = params_of(x, weights, format, codes, scales, bias, x_scales, out);
  STD_TORCH_CHECK(codes.size(0) == 1, "codes: ", codes.size(0), " weights; expected one");
  check_size(out, 0, p.num_tokens, "out");
  if (p.num_tokens == 0) return;
  STD_TORCH_CHECK(p.num_tokens == 1 || p.x_stride >= p.in_features, "x: rows that overlap; call contiguous()");
  const int64_t tokens = p.num_tokens, row_tiles = p.padded_out / kProductRows;
  const int tile = format.tile(tokens);
  split_columns(p, row_tiles, format.costs, place);
  if (tile == format.walking_tile && one_block_sums(p, row_tiles * ceil_div(tokens, tile), format.costs, place))
    p.splits_of_block = p.splits;
  if (p.x_scales && one_block_sums(p, row_tiles * ceil_div(tokens, tile), format.costs, place))
    p.splits = 1, p.chunks_of_split = p.num_chunks;  // integers: the same sum in any order
  const int64_t most = tokens_of_launch(p, tokens);
  p.num_tokens = static_cast<int>(most);
  const Tensor partial = sums_of_splits(p, row_tiles, ceil_div(most, tile), tile, x, arrived);
  for (int64_t begin = 0; begin < tokens; begin += most) {
    ProductParams part = p;
    part.num_tokens = static_cast<int>(std::min(most, tokens - begin));
    part.x = static_cast<const unsigned char*>(p.x) + begin * p.x_stride * format.value_bytes;
    part.out = static_cast<unsigned char*>(p.out) + begin * p.out_features * kHalfBytes;
    if (p.x_scales) part.x_scales = p.x_scales + begin;
    format.launch(out.scalar_type(), tile, static_cast<int>(ceil_div(part.num_tokens, tile)), place, part);
  }
}

// Each slot's row by its expert's weight. slots: [tiles, tile], tile_experts: [tiles], as sort_slots makes them; slot s is
// row s / slots_of_row of x. out: [num_slots, out_features]; rows of slots that no tile has are not written.
void expert_linear(const Tensor& x, std::string weights, const Tensor& codes, const std::optional<Tensor>& scales,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& x_scales, const Tensor& slots,
                   const Tensor& tile_experts, int64_t slots_of_row, const Tensor& out) {
  const Format format = format_of(weights);
  ProductParams p = params_of(x, weights, format, codes, scales, bias, x_scales, out);
  STD_TORCH_CHECK(slots_of_row >= 1, "slots_of_row: ", slots_of_row, "; expected at least 1");
  check_size(out, 0, p.num_tokens * slots_of_row, "out");
  STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Int && slots.dim() == 2 && slots.is_contiguous(),
                  "slots: expected [tiles, tile] int32, contiguous");
  const int64_t tiles = slots.size(0);
  p.tile_experts = int32s(tile_experts, tiles, "tile_experts");
  p.slots = data<int32_t>(slots);
  p.slots_of_row = static_cast<int>(slots_of_row);
  if (p.num_tokens == 0) return;
  const Place place(x.get_device_index());
  format.launch(out.scalar_type(), static_cast<int>(slots.size(1)), static_cast<int>(tiles), place, p);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def(
      "linear(Tensor x, str weights, Tensor codes, Tensor? scales, Tensor? bias, Tensor? x_scales, "
      "Tensor(a!) arrived, Tensor(b!) out) -> ()");
  library.def(
      "expert_linear(Tensor x, str weights, Tensor codes, Tensor? scales, Tensor? bias, Tensor? x_scales, "
      "Tensor slots, Tensor tile_experts, int slots_of_row, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("expert_linear", TORCH_BOX(&expert_linear));
}

}  // namespace cuda_ops
