// The ops rms_norm, add_rms_norm, layer_norm: checks, and rows shared out among torch's threads.

#include "elementwise.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "rows.h"
#include "tensors.h"

namespace cpu_ops {
namespace {

using torch::stable::Tensor;

Norm norm_of(const Tensor& x, const Tensor& weight, const Tensor& out, double eps, double weight_offset) {
  check_rows(x, "x");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.is_contiguous() && weight.size(0) == x.size(1) &&
                      weight.scalar_type() == x.scalar_type(),
                  "weight: expected [hidden] of x's dtype");
  Norm norm{};
  norm.type = type_of(x, "x");
  norm.size = x.size(1);
  norm.x_stride = x.stride(0);
  norm.x = x.const_data_ptr();
  norm.weight = weight.const_data_ptr();
  norm.out = out.mutable_data_ptr();
  norm.eps = static_cast<float>(eps);
  norm.weight_offset = static_cast<float>(weight_offset);
  return norm;
}

void add(Norm& norm, const Tensor& x, const Tensor& residual) {
  check_rows(residual, "residual");
  STD_TORCH_CHECK(residual.size(0) == x.size(0) && residual.size(1) == x.size(1) &&
                      residual.scalar_type() == x.scalar_type(),
                  "residual: expected x's shape and dtype");
  norm.residual = residual.const_data_ptr();
  norm.residual_stride = residual.stride(0);
}

void run(const Norm& norm, void (*op)(const Norm&, int64_t, int64_t), int64_t rows) {
  for_rows(rows, norm.size, [&](int64_t first, int64_t last) { op(norm, first, last); });
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset) {
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  const Norm norm = norm_of(x, weight, out, eps, weight_offset);
  run(norm, CPU_OPS_PICK_BF16(rms_norm, norm.type), x.size(0));
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                                        double weight_offset) {
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Tensor total = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Norm norm = norm_of(x, weight, out, eps, weight_offset);
  add(norm, x, residual);
  norm.total = total.mutable_data_ptr();
  run(norm, CPU_OPS_PICK_BF16(rms_norm, norm.type), x.size(0));
  return {out, total};
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                  const std::optional<Tensor>& residual) {
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Norm norm = norm_of(x, weight, out, eps, 0.0);
  STD_TORCH_CHECK(bias.dim() == 1 && bias.is_contiguous() && bias.size(0) == x.size(1) &&
                      bias.scalar_type() == x.scalar_type(),
                  "bias: expected [hidden] of x's dtype");
  norm.bias = bias.const_data_ptr();
  if (residual) add(norm, x, *residual);
  run(norm, CPU_OPS_PICK_BF16(layer_norm, norm.type), x.size(0));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset) -> Tensor");
  library.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset) -> (Tensor, Tensor)");
  library.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? residual) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  library.impl("layer_norm", TORCH_BOX(&layer_norm));
}

}  // namespace cpu_ops
