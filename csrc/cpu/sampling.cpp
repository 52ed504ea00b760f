// The ops argmax and log_softmax_gather: what greedy sampling and scoring need of logits, in the dtype they come in.

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

Logits logits_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && (x.stride(1) == 1 || x.size(1) == 1),
                  "logits: expected [rows, vocab], the last dimension contiguous");
  return {type_of(x, "logits"), x.size(1), x.stride(0), x.const_data_ptr()};
}

std::tuple<Tensor, Tensor> argmax(const Tensor& x) {
  Tensor best = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
  Tensor index = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Long);
  const Argmax rows{logits_of(x), static_cast<float*>(best.mutable_data_ptr()),
                    static_cast<int64_t*>(index.mutable_data_ptr())};
  const auto op = CPU_OPS_PICK(argmax);
  torch::stable::parallel_for(0, x.size(0), 1, [&](int64_t first, int64_t last) { op(rows, first, last); });
  return {best, index};
}

Tensor log_softmax_gather(const Tensor& x, const Tensor& targets) {
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.dim() == 1 && targets.is_contiguous() &&
                      targets.size(0) == x.size(0),
                  "targets: expected a contiguous int64 a row");
  Tensor out = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
  const LogSoftmaxGather rows{logits_of(x), static_cast<const int64_t*>(targets.const_data_ptr()),
                              static_cast<float*>(out.mutable_data_ptr())};
  for (int64_t i = 0; i < x.size(0); ++i)
    STD_TORCH_CHECK(rows.targets[i] >= 0 && rows.targets[i] < x.size(1), "targets: ", rows.targets[i],
                    "; expected 0 to ", x.size(1) - 1);
  const auto op = CPU_OPS_PICK(log_softmax_gather);
  torch::stable::parallel_for(0, x.size(0), 1, [&](int64_t first, int64_t last) { op(rows, first, last); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) {
  library.def("argmax(Tensor logits) -> (Tensor, Tensor)");
  library.def("log_softmax_gather(Tensor logits, Tensor targets) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) {
  library.impl("argmax", TORCH_BOX(&argmax));
  library.impl("log_softmax_gather", TORCH_BOX(&log_softmax_gather));
}

}  // namespace cpu_ops
