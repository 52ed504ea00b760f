// The ops quantize, add_rms_norm_quantize and act_and_mul_quantize: checks and launches. They give inputs of products as codes
// [rows, in_features in whole tiles of 128] and their scales: [rows], or of tiles [in_features / 128, rows in whole tiles].

#include "quantize.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>

#include "elementwise.h"
#include "linear_fp8.h"

namespace cuda_ops {
namespace {

Rounding rounding_of(const std::string& name) {
  if (name == "int8") return Rounding::int8;
  if (name == "e4m3") return Rounding::e4m3;
  STD_TORCH_CHECK(name == "e4m3 128", "to: ", name, "; expected int8, e4m3 or e4m3 128");
  return Rounding::e4m3_tiles;
}

// source(tag): a Source of quantize_kernel for rows of `size` values of like's type. threads: of a row.
template <class MakeSource>
std::tuple<Tensor, Tensor> rounded(const Tensor& like, int64_t rows, int64_t size, int threads, const std::string& name,
                                   const std::optional<Tensor>& scale, const MakeSource& source) {
  const Rounding to = rounding_of(name);
  const bool tiles = to == Rounding::e4m3_tiles;
  STD_TORCH_CHECK(size % 8 == 0 && (!tiles || size % kTileColumns == 0), "x: ", size,
                  " columns; expected a multiple of 8, or of ", kTileColumns, " with scales of as many");
  if (scale)
    STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Float && scale->numel() == 1 &&
                        scale->get_device_index() == like.get_device_index(), "scale: expected one float32");
  const int64_t padded = ceil_div(size, kTileColumns) * kTileColumns;
  const int64_t room = rows ? ceil_div(rows, fp8_tile(rows)) * fp8_tile(rows) : 0;
  Tensor codes = torch::stable::new_empty(like, {rows, padded}, tiles || to == Rounding::e4m3 ? ScalarType::Byte
                                                                                              : ScalarType::Char);
  Tensor scales = tiles ? torch::stable::new_empty(like, {size / kTileColumns, room}, ScalarType::Float)
                        : torch::stable::new_empty(like, {rows}, ScalarType::Float);
  if (rows == 0) return {codes, scales};
  const Place place(like.get_device_index());
  with_half(like.scalar_type(), "x", [&]<class Tagged>(Tagged tag) {
    const auto own = source(tag);
    constexpr int kSlots = 16 * sizeof(float);
    const int row_bytes = static_cast<int>(size) * 2;
    const bool staged = kSlots + row_bytes <= shared_memory_limit(place.device);
    const QuantizeParams<std::remove_const_t<decltype(own)>> p{
        own, scale ? data<float>(*scale) : nullptr, static_cast<unsigned char*>(codes.mutable_data_ptr()),
        mutable_data<float>(scales), static_cast<int>(size), static_cast<int>(padded), static_cast<int>(room), staged};
    using Source = decltype(p.source);
    const dim3 grid(static_cast<unsigned>(rows));
    const int bytes = kSlots + (staged ? row_bytes : 0);
    const auto run = [&](auto rounding) {
      launch(quantize_kernel<std::remove_const_t<Source>, rounding.value>, grid, dim3(threads), bytes, place, p);
    };
    if (tiles) return run(std::integral_constant<Rounding, Rounding::e4m3_tiles>{});
    if (to == Rounding::e4m3) return run(std::integral_constant<Rounding, Rounding::e4m3>{});
    run(std::integral_constant<Rounding, Rounding::int8>{});
  });
  return {codes, scales};
}

bool whole_pieces(const Tensor& x) { return divides_16(x) && (x.size(0) <= 1 || x.stride(0) % 8 == 0); }

// x: [rows, size]. scale: a float32 that all are divided by, in place of scales of their own.
std::tuple<Tensor, Tensor> quantize(const Tensor& x, std::string to, const std::optional<Tensor>& scale) {
  check_dense_rows(x, 2, "x");
  STD_TORCH_CHECK(whole_pieces(x), "x: expected rows at addresses that 16 divides; call clone()");
  return rounded(x, x.size(0), x.size(1), kQuantizeThreads, to, scale, [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    return GivenRows<T>{data<T>(x), x.stride(0)};
  });
}

// What quantize makes of add_rms_norm's norm, and the sum. All dense.
std::tuple<Tensor, Tensor, Tensor> add_rms_norm_quantize(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                         double eps, double weight_offset, std::string to,
                                                         const std::optional<Tensor>& scale) {
  for (const Tensor* own : {&x, &residual})
    STD_TORCH_CHECK(own->dim() == 2 && own->is_contiguous() && divides_16(*own) && own->size(0) == x.size(0) &&
                        own->size(1) == x.size(1),
                    "x, residual: expected two of one shape, contiguous, at addresses that 16 divides");
  check_like(residual, x, "residual", "x");
  check_like(weight, x, "weight", "x");
  check_vector(weight, x.size(1), "weight");
  STD_TORCH_CHECK(divides_16(weight), "weight: expected an address that 16 divides");
  Tensor total = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  const int threads = threads_of_row(x.size(1));  // as add_rms_norm has them, for the same order of its sum
  auto [codes, scales] = rounded(x, x.size(0), x.size(1), threads, to, scale, [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    NormParams<T> p{};
    p.x = data<T>(x);
    p.residual = data<T>(residual);
    p.weight = data<T>(weight);
    p.total = mutable_data<T>(total);
    p.size = static_cast<int>(x.size(1));
    p.eps = static_cast<float>(eps);
    p.weight_offset = static_cast<float>(weight_offset);
    return NormedRows<T>{p};
  });
  return {codes, scales, total};
}

// What quantize makes of act_and_mul's result.
std::tuple<Tensor, Tensor> act_and_mul_quantize(const Tensor& gate_up, std::string name, std::string to,
                                                const std::optional<Tensor>& scale) {
  check_dense_rows(gate_up, 2, "gate_up");
  STD_TORCH_CHECK(gate_up.size(1) % 16 == 0 && whole_pieces(gate_up),
                  "gate_up: expected two halves of whole pieces of 8 values, at addresses that 16 divides");
  const int64_t size = gate_up.size(1) / 2;
  const Activation activation = activation_of(name);
  return rounded(gate_up, gate_up.size(0), size, kQuantizeThreads, to, scale, [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    return GatedRows<T>{{data<T>(gate_up), nullptr, gate_up.size(0), gate_up.stride(0), static_cast<int>(size), activation}};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def("quantize(Tensor x, str to, Tensor? scale) -> (Tensor, Tensor)");
  library.def(
      "add_rms_norm_quantize(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset, str to, "
      "Tensor? scale) -> (Tensor, Tensor, Tensor)");
  library.def("act_and_mul_quantize(Tensor gate_up, str name, str to, Tensor? scale) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("quantize", TORCH_BOX(&quantize));
  library.impl("add_rms_norm_quantize", TORCH_BOX(&add_rms_norm_quantize));
  library.impl("act_and_mul_quantize", TORCH_BOX(&act_and_mul_quantize));
}

}  // namespace cuda_ops
