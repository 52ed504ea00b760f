// The ops rms_norm, add_rms_norm, layer_norm, rope, write_kv: checks, and rows shared out among torch's threads.
// Layouts are those of engines/ops/{norm,rotary,kv_cache}.py.

#include "elementwise.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "rows.h"
#include "tensors.h"

namespace cpu_ops {
namespace {

using torch::headeronly::ScalarType;
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

const int64_t* int64s(const Tensor& tensor, const char* name, int64_t size) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.dim() == 1 && tensor.is_contiguous() &&
                      tensor.size(0) == size,
                  name, ": expected a contiguous int64 a token");
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

void check_heads(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) <= 1), name,
                  ": expected [num_tokens, heads, head_dim], the last dimension contiguous");
}

Rotation rotation_of(const Tensor& x, const int64_t* positions, const Tensor& cos_sin, const char* name) {
  check_heads(x, name);
  const int64_t half = cos_sin.size(1) / 2;
  STD_TORCH_CHECK(x.scalar_type() == cos_sin.scalar_type() && 2 * half <= x.size(2), name,
                  ": expected cos_sin's dtype, and at least rotary_dim values a head");
  return {type_of(x, name),       x.size(1), x.stride(0),            x.stride(1), half,
          x.mutable_data_ptr(), positions, cos_sin.const_data_ptr()};
}

void rope(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin) {
  STD_TORCH_CHECK(cos_sin.dim() == 2 && cos_sin.is_contiguous(), "cos_sin: expected [max_position, rotary_dim]");
  const int64_t* at = int64s(positions, "positions", q.size(0));
  for (int64_t i = 0; i < q.size(0); ++i)
    STD_TORCH_CHECK(at[i] >= 0 && at[i] < cos_sin.size(0), "positions: token ", i, " is at ", at[i],
                    "; expected 0 to ", cos_sin.size(0) - 1);
  STD_TORCH_CHECK(k.size(0) == q.size(0), "k: expected q's number of tokens");
  const Rotation of_q = rotation_of(q, at, cos_sin, "q"), of_k = rotation_of(k, at, cos_sin, "k");
  const auto op = CPU_OPS_PICK(rope);
  for_rows(q.size(0), (of_q.num_heads + of_k.num_heads) * 2 * of_q.half, [&](int64_t first, int64_t last) {
    op(of_q, first, last);
    op(of_k, first, last);
  });
}

void write(const Tensor& from, const Tensor& cache, const int64_t* slots, const char* name) {
  check_heads(from, name);
  STD_TORCH_CHECK(cache.scalar_type() == from.scalar_type() && cache.dim() == 4 && cache.is_contiguous() &&
                      cache.size(1) == from.size(1) && cache.size(3) == from.size(2),
                  name, ": expected the cache's dtype, heads and head_dim, and a contiguous cache");
  const int64_t element = size_of(type_of(from, name)), heads = cache.size(1), block_size = cache.size(2);
  const int64_t bytes = cache.size(3) * element, limit = cache.size(0) * block_size;
  const int64_t token_stride = from.stride(0) * element, head_stride = from.stride(1) * element;
  const char* source = static_cast<const char*>(from.const_data_ptr());
  char* target = static_cast<char*>(cache.mutable_data_ptr());
  for (int64_t i = 0; i < from.size(0); ++i)
    STD_TORCH_CHECK(slots[i] >= 0 && slots[i] < limit, "slot_mapping: ", slots[i], "; expected 0 to ", limit - 1);
  for_rows(from.size(0), heads * cache.size(3), [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const int64_t block = slots[token] / block_size, offset = slots[token] % block_size;
      for (int64_t head = 0; head < heads; ++head)
        std::memcpy(target + ((block * heads + head) * block_size + offset) * bytes,
                    source + token * token_stride + head * head_stride, bytes);
    }
  });
}

void write_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
              const Tensor& slot_mapping) {
  const int64_t* slots = int64s(slot_mapping, "slot_mapping", k.size(0));
  STD_TORCH_CHECK(v.size(0) == k.size(0), "v: expected k's number of tokens");
  write(k, k_cache, slots, "k");
  write(v, v_cache, slots, "v");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset) -> Tensor");
  library.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset) -> (Tensor, Tensor)");
  library.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? residual) -> Tensor");
  library.def("rope(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor cos_sin) -> ()");
  library.def(
      "write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  library.impl("layer_norm", TORCH_BOX(&layer_norm));
  library.impl("rope", TORCH_BOX(&rope));
  library.impl("write_kv", TORCH_BOX(&write_kv));
}

}  // namespace cpu_ops
