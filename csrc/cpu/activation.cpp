// The op activate: plain and gated activations, rows shared out among torch's threads. As engines/ops/activation.py.

#include "activation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "isa.h"
#include "rows.h"
#include "tensors.h"

namespace cpu_ops {
namespace {

using torch::stable::Tensor;

void run(Activate what, int64_t kind, const Tensor& x, const char* name, int64_t rows) {
  STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Activation::swiglu_oai), "activation: ", kind);
  what.kind = static_cast<Activation>(kind);
  what.type = type_of(x, name);
  what.x_stride = x.stride(0);
  what.x = x.const_data_ptr();
  const auto op = CPU_OPS_PICK_BF16(activate, what.type);
  for_rows(rows, what.size * (what.gated ? 2 : 1), [&](int64_t first, int64_t last) { op(what, first, last); });
}

void act_(const Tensor& x, int64_t kind) {
  check_rows(x, "x");
  Activate what{};
  what.size = x.size(1);
  what.out_stride = x.stride(0);
  what.out = x.mutable_data_ptr();
  run(what, kind, x, "x", x.size(0));
}

Tensor act_and_mul(const Tensor& gate_up, int64_t kind) {
  check_rows(gate_up, "gate_up");
  STD_TORCH_CHECK(gate_up.size(1) % 2 == 0, "gate_up: expected an even last dimension");
  Activate what{};
  what.gated = true;
  what.size = what.out_stride = gate_up.size(1) / 2;
  Tensor out = torch::stable::new_empty(gate_up, {gate_up.size(0), what.size});
  what.out = out.mutable_data_ptr();
  run(what, kind, gate_up, "gate_up", gate_up.size(0));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) {
  library.def("act_(Tensor(a!) x, int kind) -> ()");
  library.def("act_and_mul(Tensor gate_up, int kind) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) {
  library.impl("act_", TORCH_BOX(&act_));
  library.impl("act_and_mul", TORCH_BOX(&act_and_mul));
}

}  // namespace cpu_ops
