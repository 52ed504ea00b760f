// The ops quantize_rows and rescale_rows, around products of 8-bit integers. As engines/ops/linear.py: quantize_input.

#include "quantize.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "isa.h"
#include "rows.h"
#include "tensors.h"

namespace cpu_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, const std::optional<Tensor>& scale) {
  check_rows(x, "x");
  Quantize what{};
  what.type = type_of(x, "x");
  what.size = x.size(1);
  what.x_stride = x.stride(0);
  what.x = x.const_data_ptr();
  if (scale) {
    STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Float && scale->numel() == 1, "scale: expected one float32");
    what.given = static_cast<const float*>(scale->const_data_ptr());
  }
  Tensor codes = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
  what.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  what.scales = static_cast<float*>(scales.mutable_data_ptr());
  const auto op = CPU_OPS_PICK(quantize_rows);
  for_rows(x.size(0), x.size(1), [&](int64_t first, int64_t last) { op(what, first, last); });
  return {codes, scales};
}

void rescale_rows(const Tensor& sums, const Tensor& scales, const std::optional<Tensor>& bias, const Tensor& out) {
  STD_TORCH_CHECK(sums.dim() == 2 && sums.is_contiguous() && sums.scalar_type() == ScalarType::Float,
                  "sums: expected contiguous rows of float32");
  STD_TORCH_CHECK(scales.is_contiguous() && scales.scalar_type() == ScalarType::Float && scales.numel() == sums.size(0),
                  "scales: expected a float32 for each row");
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.size(0) == sums.size(0) && out.size(1) == sums.size(1),
                  "out: expected contiguous rows of sums' shape");
  Rescale what{};
  what.type = type_of(out, "out");
  what.size = sums.size(1);
  what.sums = static_cast<const float*>(sums.const_data_ptr());
  what.scales = static_cast<const float*>(scales.const_data_ptr());
  if (bias) {
    STD_TORCH_CHECK(bias->is_contiguous() && bias->scalar_type() == out.scalar_type() && bias->numel() == what.size,
                    "bias: expected a value of out's dtype for each column");
    what.bias = bias->const_data_ptr();
  }
  what.out = out.mutable_data_ptr();
  const auto op = CPU_OPS_PICK(rescale_rows);
  for_rows(sums.size(0), sums.size(1), [&](int64_t first, int64_t last) { op(what, first, last); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) {
  library.def("quantize_rows(Tensor x, Tensor? scale) -> (Tensor, Tensor)");
  library.def("rescale_rows(Tensor sums, Tensor scales, Tensor? bias, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) {
  library.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  library.impl("rescale_rows", TORCH_BOX(&rescale_rows));
}

}  // namespace cpu_ops
