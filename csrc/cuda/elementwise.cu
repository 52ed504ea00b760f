// The ops rms_norm, add_rms_norm, act_and_mul, softcap, rope, write_kv: checks and launches.

#include "elementwise.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "tensors.h"

namespace cuda_ops {
namespace {

constexpr int kShortRow = 1024;  // values that one warp takes

// Calls function(width) with the values that a thread may load at once of T: 16 bytes, or one value where addresses or
// sizes do not allow it.
template <class T, class Function> void with_width(bool wide, const Function& function) {
  if (wide) return function(std::integral_constant<int, 16 / static_cast<int>(sizeof(T))>{});
  function(std::integral_constant<int, 1>{});
}

bool all_divide(int64_t by, std::initializer_list<int64_t> values) {
  return std::all_of(values.begin(), values.end(), [&](int64_t value) { return value % by == 0; });
}

bool all_aligned(std::initializer_list<const Tensor*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor* tensor) { return divides_16(*tensor); });
}

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
      const bool brief = size <= kShortRow;
      const dim3 threads(brief ? 32 : 256, brief ? 4 : 1);
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

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  STD_TORCH_CHECK(name == "swiglu_oai", "name: ", name, "; expected silu, gelu, gelu_tanh, relu or swiglu_oai");
  return Activation::swiglu_oai;
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

void rope(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin) {
  check_dense_rows(q, 3, "q");
  check_dense_rows(k, 3, "k");
  check_like(k, q, "k", "q");
  check_like(cos_sin, q, "cos_sin", "q");
  const int64_t tokens = q.size(0);
  STD_TORCH_CHECK(cos_sin.dim() == 2 && cos_sin.is_contiguous() && cos_sin.size(1) % 2 == 0 &&
                      cos_sin.size(1) <= q.size(2), "cos_sin: expected [max_position, rotary_dim], contiguous, with an "
                      "even rotary_dim of at most ", q.size(2));
  check_size(k, 0, tokens, "k");
  check_size(k, 2, q.size(2), "k");
  const int64_t* at = int64s(positions, tokens, "positions");
  if (tokens == 0) return;
  const Place place(q.get_device_index());
  with_float(q, "q", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    const RopeParams<T> p{mutable_data<T>(q), mutable_data<T>(k), at, data<T>(cos_sin), q.stride(0), q.stride(1),
                          k.stride(0), k.stride(1), cos_sin.size(0), static_cast<int>(q.size(1)),
                          static_cast<int>(k.size(1)), static_cast<int>(cos_sin.size(1) / 2)};
    const bool wide = all_divide(16 / sizeof(T), {p.half, p.q_token_stride, p.q_head_stride, p.k_token_stride,
                                                  p.k_head_stride}) && all_aligned({&q, &k, &cos_sin});
    with_width<T>(wide, [&](auto width) {
      launch(rope_kernel<T, width.value>, dim3(static_cast<unsigned>(tokens)), dim3(128), 0, place, p);
    });
  });
}

void check_cache(const Tensor& cache, const Tensor& like, int64_t heads, int64_t head_dim, const char* name) {
  check_like(cache, like, name, "the new keys and values");
  STD_TORCH_CHECK(cache.dim() == 4 && cache.is_contiguous() && cache.size(1) == heads && cache.size(3) == head_dim,
                  name, ": expected [num_blocks, ", heads, ", block_size, ", head_dim, "], contiguous");
}

void write_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
              const Tensor& slot_mapping) {
  check_dense_rows(k, 3, "k");
  check_dense_rows(v, 3, "v");
  check_like(v, k, "v", "k");
  for (int dim = 0; dim < 3; ++dim) check_size(v, dim, k.size(dim), "v");
  check_cache(k_cache, k, k.size(1), k.size(2), "k_cache");
  check_cache(v_cache, k, k.size(1), k.size(2), "v_cache");
  check_size(v_cache, 2, k_cache.size(2), "v_cache");
  const int64_t tokens = k.size(0);
  const int64_t* slots = int64s(slot_mapping, tokens, "slot_mapping");
  if (tokens == 0) return;
  const Place place(k.get_device_index());
  with_float(k, "k", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    const CacheWriteParams<T> p{data<T>(k), data<T>(v), mutable_data<T>(k_cache), mutable_data<T>(v_cache), slots,
                                k.stride(0), k.stride(1), v.stride(0), v.stride(1),
                                std::min(k_cache.size(0), v_cache.size(0)) * k_cache.size(2),
                                static_cast<int>(k.size(1)), static_cast<int>(k_cache.size(2)),
                                static_cast<int>(k.size(2))};
    const bool wide = all_divide(16 / sizeof(T), {p.head_dim, p.k_token_stride, p.k_head_stride, p.v_token_stride,
                                                  p.v_head_stride}) && all_aligned({&k, &v, &k_cache, &v_cache});
    with_width<T>(wide, [&](auto width) {
      launch(cache_write_kernel<T, width.value>, dim3(static_cast<unsigned>(tokens)), dim3(128), 0, place, p);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset) -> Tensor");
  library.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset) -> (Tensor, Tensor)");
  library.def("act_and_mul(Tensor gate_up, str name) -> Tensor");
  library.def("softcap(Tensor x, float cap) -> Tensor");
  library.def("rope(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor cos_sin) -> ()");
  library.def("write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  library.impl("act_and_mul", TORCH_BOX(&act_and_mul));
  library.impl("softcap", TORCH_BOX(&softcap));
  library.impl("rope", TORCH_BOX(&rope));
  library.impl("write_kv", TORCH_BOX(&write_kv));
}

}  // namespace cuda_ops
