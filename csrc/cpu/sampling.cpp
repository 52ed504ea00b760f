// The op argmax: what greedy sampling needs of logits, in the dtype they come in.

#include "sampling.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "rows.h"
#include "tensors.h"

namespace cpu_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> argmax(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && (x.stride(1) == 1 || x.size(1) == 1),
                  "logits: expected [rows, vocab], the last dimension contiguous");
  Tensor best = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
  Tensor index = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Long);
  const Rows2d rows{type_of(x, "logits"), x.size(1), x.stride(0), x.const_data_ptr(),
                    static_cast<float*>(best.mutable_data_ptr()), static_cast<int64_t*>(index.mutable_data_ptr())};
  const auto op = CPU_OPS_PICK(argmax);
  torch::stable::parallel_for(0, x.size(0), 1, [&](int64_t first, int64_t last) { op(rows, first, last); });
  return {best, index};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) { library.def("argmax(Tensor logits) -> (Tensor, Tensor)"); }

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) { library.impl("argmax", TORCH_BOX(&argmax)); }

}  // namespace cpu_ops
