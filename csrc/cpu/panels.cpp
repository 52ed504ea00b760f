// The ops pack_panels and linear_panels: products on vectors whose bits do not depend on the batch.

#include "panels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "deal.h"
#include "isa.h"
#include "rows.h"
#include "tensors.h"

namespace cpu_ops {
namespace {

using torch::stable::Tensor;

constexpr int64_t kCacheBytes = 768 * 1024;  // of float32 rows that go together
constexpr int64_t kTurns = 4;                // parts of the weights that a thread takes, one after the other

Tensor pack_panels(const Tensor& weight) {
  const int64_t bytes = size_of(type_of(weight, "weight")), n = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight: expected a contiguous matrix");
  Tensor packed = torch::stable::new_empty(weight, {ceil(n, kPanelOutputs), k, kPanelOutputs});
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  torch::stable::parallel_for(0, ceil(n, kPanelOutputs), 1, [&](int64_t first, int64_t last) {
    std::memset(to + first * k * kPanelOutputs * bytes, 0, (last - first) * k * kPanelOutputs * bytes);
    for (int64_t output = first * kPanelOutputs; output < std::min(n, last * kPanelOutputs); ++output) {
      char* at = to + (output / kPanelOutputs * k * kPanelOutputs + output % kPanelOutputs) * bytes;
      for (int64_t i = 0; i < k; ++i) std::memcpy(at + i * kPanelOutputs * bytes, from + (output * k + i) * bytes, bytes);
    }
  });
  return packed;
}

Tensor linear_panels(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t out_features) {
  check_rows(x, "x");
  const Type type = type_of(x, "x");
  const int64_t bytes = size_of(type), rows = x.size(0), k = x.size(1), n = out_features, panels = ceil(n, kPanelOutputs);
  STD_TORCH_CHECK(packed.scalar_type() == x.scalar_type() && packed.is_contiguous() && packed.dim() == 3 &&
                      packed.size(0) == panels && packed.size(1) == k && packed.size(2) == kPanelOutputs,
                  "packed: expected what pack_panels made of a weight of x's dtype, ", n, " x ", k);
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == x.scalar_type() && bias->is_contiguous() && bias->numel() == n),
                  "bias: expected ", n, " contiguous values of x's dtype");
  Tensor out = torch::stable::new_empty(x, {rows, n});
  if (rows == 0 || n == 0) return out;
  Panels all{};
  all.type = type;
  all.k = k;
  all.n = n;
  all.weight = packed.const_data_ptr();
  all.bias = bias ? bias->const_data_ptr() : nullptr;
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t threads = torch::stable::get_num_threads();
  const Chunks chunks(rows, std::clamp<int64_t>(kCacheBytes / std::max<int64_t>(1, k * 4), 32, 256), 1);
  const int64_t parts = chunks.count >= 4 * threads ? 1 : std::min(panels, threads == 1 ? 1 : kTurns * threads);
  deal(chunks.count * parts, type == Type::f32 ? 64 : chunks.size * k * 4 + 64, [&](int64_t i, char* room) {
    const int64_t first = chunks.first(i / parts), part = i % parts;
    Panels what = all;
    what.rows = chunks.last(i / parts) - first;
    what.out = to + first * n * bytes;
    if (type == Type::f32) {
      what.x = reinterpret_cast<const float*>(from) + first * x.stride(0);
      what.x_stride = x.stride(0);
    } else {
      CPU_OPS_PICK(widen_rows)(type, from + first * x.stride(0) * bytes, x.stride(0), what.rows, k, reinterpret_cast<float*>(room));
      what.x = reinterpret_cast<const float*>(room);
      what.x_stride = k;
    }
    CPU_OPS_PICK(multiply_panels)(what, panels * part / parts, panels * (part + 1) / parts);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) {
  library.def("pack_panels(Tensor weight) -> Tensor");
  library.def("linear_panels(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) {
  library.impl("pack_panels", TORCH_BOX(&pack_panels));
  library.impl("linear_panels", TORCH_BOX(&linear_panels));
}

}  // namespace cpu_ops
