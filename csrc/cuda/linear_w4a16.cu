// The op w4a16_linear: checks, splits, launch.

#include "linear_w4a16.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "tensors.h"

namespace cuda_ops {
namespace {

constexpr int kLeastChunks = 8;  // of a split: 512 columns

template <class T> void run(const W4Params& p, const Place& place) {
  const auto with_tokens = [&](auto tokens) {
    using Shape = W4Shape<tokens.value>;
    const dim3 grid(static_cast<unsigned>(ceil_div(p.num_tokens, tokens.value)),
                    static_cast<unsigned>(p.padded_out / kW4Rows), static_cast<unsigned>(p.splits));
    launch(w4a16_kernel<T, tokens.value>, grid, dim3(Shape::kThreads), Shape::kSharedBytes, place, p);
  };
  if (p.num_tokens <= 8) return with_tokens(std::integral_constant<int, 8>{});
  if (p.num_tokens <= 16) return with_tokens(std::integral_constant<int, 16>{});
  if (p.num_tokens <= 32) return with_tokens(std::integral_constant<int, 32>{});
  with_tokens(std::integral_constant<int, 64>{});
}

// codes: [padded_out / 16, in_features / 64, 32, 4] int32; groups: [in_features / group_size, padded_out] int32, as
// W4Params has them. arrived: int32 zeros; zeros again afterwards.
Tensor w4a16_linear(const Tensor& x, const Tensor& codes, const Tensor& groups, const std::optional<Tensor>& bias,
                    const Tensor& arrived, int64_t out_features, bool scales_are_bf16) {
  check_dense_rows(x, 2, "x");
  const int64_t tokens = x.size(0), in_features = x.size(1), padded = groups.size(1);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Int && codes.dim() == 4 && codes.is_contiguous() &&
                      codes.size(0) * 16 == padded && codes.size(1) * kW4Columns == in_features && codes.size(2) == 32 &&
                      codes.size(3) == 4, "codes: expected [", padded / 16, ", ", in_features / kW4Columns,
                  ", 32, 4] int32, contiguous");
  STD_TORCH_CHECK(groups.scalar_type() == ScalarType::Int && groups.dim() == 2 && groups.is_contiguous() &&
                      padded % kW4Rows == 0 && out_features <= padded && padded - out_features < kW4Rows,
                  "groups: expected [groups, ", ceil_div(out_features, kW4Rows) * kW4Rows, "] int32, contiguous");
  const int64_t group_size = in_features / std::max<int64_t>(1, groups.size(0));
  STD_TORCH_CHECK(groups.size(0) * group_size == in_features && group_size % 32 == 0 &&
                      (group_size == 32 || group_size % kW4Columns == 0), "groups: ", groups.size(0),
                  " of ", in_features, " columns; expected groups of 32 or of a multiple of ", kW4Columns);
  STD_TORCH_CHECK(divides_16(x) && (tokens <= 1 || x.stride(0) % 8 == 0),
                  "x: expected rows at addresses that 16 divides; call clone()");
  Tensor out = torch::stable::new_empty(x, {tokens, out_features});
  if (bias) {
    check_like(*bias, x, "bias", "x");
    check_vector(*bias, out_features, "bias");
  }
  if (tokens == 0) return out;
  const Place place(x.get_device_index());
  const int64_t chunks = in_features / kW4Columns, row_tiles = padded / kW4Rows;
  const int64_t wanted = std::clamp<int64_t>(ceil_div(multiprocessors(place.device), row_tiles), 1,
                                             std::max<int64_t>(1, chunks / kLeastChunks));
  W4Params p{};
  p.chunks_of_split = static_cast<int>(ceil_div(chunks, wanted));
  p.splits = static_cast<int>(ceil_div(chunks, p.chunks_of_split));
  STD_TORCH_CHECK(arrived.scalar_type() == ScalarType::Int && arrived.is_contiguous() &&
                      arrived.numel() >= row_tiles * ceil_div(tokens, 64), "arrived: expected at least ",
                  row_tiles * ceil_div(tokens, 64), " int32");
  Tensor partial = torch::stable::new_empty(x, {p.splits > 1 ? p.splits * tokens * padded : 0}, ScalarType::Float);
  p.x = x.const_data_ptr();
  p.codes = static_cast<const uint4*>(codes.const_data_ptr());
  p.groups = static_cast<const uint32_t*>(groups.const_data_ptr());
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  p.partial = mutable_data<float>(partial);
  p.arrived = mutable_data<int32_t>(arrived);
  p.x_stride = x.stride(0);
  p.num_tokens = static_cast<int>(tokens);
  p.in_features = static_cast<int>(in_features);
  p.out_features = static_cast<int>(out_features);
  p.padded_out = static_cast<int>(padded);
  p.group_size = static_cast<int>(group_size);
  p.scales_are_bf16 = scales_are_bf16;
  with_half(x, "x", [&]<class Tagged>(Tagged) { run<typename Tagged::type>(p, place); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def(
      "w4a16_linear(Tensor x, Tensor codes, Tensor groups, Tensor? bias, Tensor(a!) arrived, int out_features, "
      "bool scales_are_bf16) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("w4a16_linear", TORCH_BOX(&w4a16_linear));
}

}  // namespace cuda_ops
