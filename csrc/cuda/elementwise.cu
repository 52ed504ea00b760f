// The ops rms_norm, add_rms_norm, act_and_mul, softcap: checks and launches.

#include "elementwise.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <tuple>

namespace cuda_ops {
namespace {

// x: [rows, size] or [outer, inner, size].
void norm(const Tensor& x, const Tensor* residual, const Tensor& weight, const Tensor& out, const Tensor* total,
          double eps, double weight_offset) {
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "x: ", x.dim(), " dimensions; expected 2 or 3");
  check_dense_rows(x, x.dim(), "x");
  const int64_t size = x.size(x.dim() - 1), rows = x.numel() / std::max<int64_t>(1, size);
  check_like(weight, x, "weight", "x");
  check_vector(weight, size, "weight");
  if (residual) {
    check_like(*residual, x, "residual", "x");
    STD_TORCH_CHECK(x.dim() == 2 && residual->dim() == 2 && residual->is_contiguous() && residual->size(0) == rows &&
                        residual->size(1) == size, "residual: expected [", rows, ", ", size, "], contiguous");
  }
  if (rows == 0) return;
  const Place place(x.get_device_index());
  with_float(x, "x", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    NormParams<T> p{};
    p.x = data<T>(x);
    p.residual = residual ? data<T>(*residual) : nullptr;
    p.weight = data<T>(weight);
    p.out = mutable_data<T>(out);
    p.total = total ? mutable_data<T>(*total) : nullptr;
    p.rows = rows;
    p.inner = x.dim() == 3 ? x.size(1) : 1;
    p.outer_stride = x.stride(0);
    p.inner_stride = x.dim() == 3 ? x.stride(1) : 0;
    p.size = static_cast<int>(size);
    p.eps = static_cast<float>(eps);
    p.weight_offset = static_cast<float>(weight_offset);
    const bool wide = all_divide(16 / sizeof(T), {size, p.outer_stride, p.inner_stride}) &&
                      all_aligned({&x, residual ? residual : &x, &weight});
    with_width<T>(wide, [&](auto width) {
      const int of_row = threads_of_row(size);
      const dim3 threads(of_row, of_row == 32 ? 4 : 1);
      launch(norm_kernel<T, width.value>, dim3(static_cast<unsigned>(ceil_div(rows, threads.y))), threads,
             8 * sizeof(float), place, p);
    });
  });
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset) {
  Tensor out = x.dim() == 3 ? torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)})
                            : torch::stable::new_empty(x, {x.size(0), x.size(1)});
  norm(x, nullptr, weight, out, nullptr, eps, weight_offset);
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                                        double weight_offset) {
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Tensor total = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  norm(x, &residual, weight, out, &total, eps, weight_offset);
  return {out, total};
}

Tensor act_and_mul(const Tensor& gate_up, std::string name) {
  check_dense_rows(gate_up, 2, "gate_up");
  STD_TORCH_CHECK(gate_up.size(1) % 2 == 0, "gate_up: ", gate_up.size(1), " columns; expected an even number");
  const int64_t rows = gate_up.size(0), size = gate_up.size(1) / 2;
  Tensor out = torch::stable::new_empty(gate_up, {rows, size});
  const Activation activation = activation_of(name);
  if (rows == 0 || size == 0) return out;
  const Place place(gate_up.get_device_index());
  with_float(gate_up, "gate_up", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    const GateParams<T> p{data<T>(gate_up), mutable_data<T>(out), rows, gate_up.stride(0), static_cast<int>(size),
                          activation};
    const bool wide = all_divide(16 / sizeof(T), {size, p.row_stride}) && all_aligned({&gate_up});
    with_width<T>(wide, [&](auto width) {
      const dim3 grid(static_cast<unsigned>(ceil_div(size, 256 * width.value)),
                      static_cast<unsigned>(std::min<int64_t>(rows, 65535)));
      launch(gate_kernel<T, width.value>, grid, dim3(256), 0, place, p);
    });
  });
  return out;
}

Tensor softcap(const Tensor& x, double cap) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x: expected 2 dimensions, contiguous");
  STD_TORCH_CHECK(cap > 0, "cap: ", cap, "; expected a positive number");
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  if (x.numel() == 0) return out;
  const Place place(x.get_device_index());
  with_float(x, "x", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    const SoftcapParams<T> p{data<T>(x), mutable_data<T>(out), x.numel(), static_cast<float>(cap)};
    with_width<T>(all_divide(16 / sizeof(T), {p.size}) && all_aligned({&x}), [&](auto width) {
      launch(softcap_kernel<T, width.value>, dim3(static_cast<unsigned>(ceil_div(p.size, 256 * width.value))),
             dim3(256), 0, place, p);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset) -> Tensor");
  library.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset) -> (Tensor, Tensor)");
  library.def("act_and_mul(Tensor gate_up, str name) -> Tensor");
  library.def("softcap(Tensor x, float cap) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  library.impl("act_and_mul", TORCH_BOX(&act_and_mul));
  library.impl("softcap", TORCH_BOX(&softcap));
}

}  // namespace cuda_ops
