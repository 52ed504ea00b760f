// The ops rope, write_kv, write_quantized_kv, and those that do both, rope_write_kv and rope_write_quantized_kv: checks and
// launches.

#include "kv_write.cuh"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>

#include "tensors.h"

namespace cuda_ops {
namespace {

// What keys, and queries where there are some, are turned by.
struct Rotation {
  const Tensor &q, &positions, &cos_sin;
};

template <class T> Angles<T> angles_of(const Rotation& by, const Tensor& k) {
  const auto& [q, positions, cos_sin] = by;
  check_dense_rows(q, 3, "q");
  check_like(k, q, "k", "q");
  check_like(cos_sin, q, "cos_sin", "q");
  const int64_t tokens = q.size(0);
  STD_TORCH_CHECK(cos_sin.dim() == 2 && cos_sin.is_contiguous() && cos_sin.size(1) % 2 == 0 &&
                      cos_sin.size(1) <= q.size(2), "cos_sin: expected [max_position, rotary_dim], contiguous, with an "
                      "even rotary_dim of at most ", q.size(2));
  check_size(k, 0, tokens, "k");
  check_size(k, 2, q.size(2), "k");
  return {int64s(positions, tokens, "positions"), data<T>(cos_sin), cos_sin.size(0),
          static_cast<int>(cos_sin.size(1) / 2)};
}

void rope(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin) {
  check_dense_rows(k, 3, "k");
  const Place place(q.get_device_index());
  with_float(q, "q", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    const RopeParams<T> p{mutable_data<T>(q), mutable_data<T>(k), q.stride(0), q.stride(1), k.stride(0), k.stride(1),
                          static_cast<int>(q.size(1)), static_cast<int>(k.size(1)),
                          angles_of<T>({q, positions, cos_sin}, k)};
    if (q.size(0) == 0) return;
    const bool wide = all_divide(16 / sizeof(T), {p.angles.half, p.q_token_stride, p.q_head_stride, p.k_token_stride,
                                                  p.k_head_stride}) && all_aligned({&q, &k, &cos_sin});
    with_width<T>(wide, [&](auto width) {
      launch(rope_kernel<T, width.value>, dim3(static_cast<unsigned>(q.size(0))), dim3(128), 0, place, p);
    });
  });
}

// k_to, v_to: where the cache's rows begin.
template <class T, class Rows>
void write(const Tensor& k, const Tensor& v, const Rotation* by, const Rows& k_to, const Rows& v_to, int64_t num_slots,
           int64_t block_size, bool wide, const Tensor& slot_mapping) {
  check_dense_rows(v, 3, "v");
  check_like(v, k, "v", "k");
  for (int dim = 0; dim < 3; ++dim) check_size(v, dim, k.size(dim), "v");
  const int64_t tokens = k.size(0), head_dim = k.size(2);
  KvWriteParams<T, Rows> p{};
  p.k = data<T>(k);
  p.v = data<T>(v);
  p.k_to = k_to;
  p.v_to = v_to;
  p.slot_mapping = int64s(slot_mapping, tokens, "slot_mapping");
  p.k_token_stride = k.stride(0);
  p.k_head_stride = k.stride(1);
  p.v_token_stride = v.stride(0);
  p.v_head_stride = v.stride(1);
  p.num_slots = num_slots;
  p.num_kv_heads = static_cast<int>(k.size(1));
  p.block_size = static_cast<int>(block_size);
  p.head_dim = static_cast<int>(head_dim);
  if (by) {
    p.angles = angles_of<T>(*by, k);
    p.q = mutable_data<T>(by->q);
    p.q_token_stride = by->q.stride(0);
    p.q_head_stride = by->q.stride(1);
    p.num_heads = static_cast<int>(by->q.size(1));
    wide = wide && all_aligned({&by->q, &by->cos_sin});
  }
  if (tokens == 0 || p.num_kv_heads == 0 || head_dim == 0) return;
  wide = wide && all_aligned({&k, &v}) &&
         all_divide(16 / sizeof(T), {head_dim, p.angles.half, p.k_token_stride, p.k_head_stride, p.v_token_stride,
                                     p.v_head_stride, p.q_token_stride, p.q_head_stride});
  const Place place(k.get_device_index());
  with_width<T>(wide, [&](auto width) {
    p.lanes = 1;
    while (p.lanes < 32 && p.lanes * width.value < head_dim) p.lanes *= 2;
    p.q_blocks = static_cast<int>(ceil_div(int64_t{p.num_heads} * (p.angles.half / width.value), kWriteThreads));
    const int64_t blocks = p.q_blocks + ceil_div(int64_t{2} * p.num_kv_heads * p.lanes, kWriteThreads);
    launch(kv_write_kernel<T, width.value, Rows>, dim3(static_cast<unsigned>(tokens), static_cast<unsigned>(blocks)),
           dim3(kWriteThreads), 0, place, p);
  });
}

void check_cache(const Tensor& cache, const Tensor& like, const char* name) {
  const int64_t heads = like.size(1), head_dim = like.size(2);
  check_like(cache, like, name, "the new keys and values");
  STD_TORCH_CHECK(cache.dim() == 4 && cache.is_contiguous() && cache.size(1) == heads && cache.size(3) == head_dim,
                  name, ": expected [num_blocks, ", heads, ", block_size, ", head_dim, "], contiguous");
}

void write_plain(const Tensor& k, const Tensor& v, const Rotation* by, const Tensor& k_cache, const Tensor& v_cache,
                 const Tensor& slot_mapping) {
  check_dense_rows(k, 3, "k");
  check_cache(k_cache, k, "k_cache");
  check_cache(v_cache, k, "v_cache");
  check_size(v_cache, 2, k_cache.size(2), "v_cache");
  with_float(k, "k", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    write<T>(k, v, by, PlainRows<T>{mutable_data<T>(k_cache)}, PlainRows<T>{mutable_data<T>(v_cache)},
             std::min(k_cache.size(0), v_cache.size(0)) * k_cache.size(2), k_cache.size(2),
             all_aligned({&k_cache, &v_cache}), slot_mapping);
  });
}

void check_codes(const Tensor& codes, const Tensor& scales, const Tensor& like, Form form, const char* name) {
  const int64_t heads = like.size(1), width = kv_width(form, static_cast<int>(like.size(2)));
  const int64_t numbers = kv_numbers(form), device = like.get_device_index();
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.dim() == 4 && codes.is_contiguous() &&
                      codes.size(1) == heads && codes.size(3) == width && codes.get_device_index() == device,
                  name, ": expected [num_blocks, ", heads, ", block_size, ", width, "] uint8, contiguous");
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.dim() == 4 && scales.is_contiguous() &&
                      scales.size(0) == codes.size(0) && scales.size(1) == heads &&
                      scales.size(2) == codes.size(2) && scales.size(3) == numbers &&
                      scales.get_device_index() == device,
                  name, ": expected scales of [num_blocks, ", heads, ", block_size, ", numbers,
                  "] float32, contiguous");
}

void write_codes(const Tensor& k, const Tensor& v, const Rotation* by, const std::string& kv_dtype,
                 const Tensor& k_codes, const Tensor& v_codes, const Tensor& k_scales, const Tensor& v_scales,
                 const Tensor& slot_mapping) {
  check_dense_rows(k, 3, "k");
  const Form form = form_of(kv_dtype);
  check_codes(k_codes, k_scales, k, form, "k_codes");
  check_codes(v_codes, v_scales, k, form, "v_codes");
  check_size(v_codes, 2, k_codes.size(2), "v_codes");
  const auto with_form = [&](auto of) {
    using Rows = CodedRows<of.value>;
    with_float(k, "k", [&]<class Tagged>(Tagged) {
      write<typename Tagged::type>(k, v, by, Rows{mutable_data<uint8_t>(k_codes), mutable_data<float>(k_scales)},
                                   Rows{mutable_data<uint8_t>(v_codes), mutable_data<float>(v_scales)},
                                   std::min(k_codes.size(0), v_codes.size(0)) * k_codes.size(2), k_codes.size(2),
                                   all_aligned({&k_codes, &v_codes}), slot_mapping);
    });
  };
  if (form == Form::int8) return with_form(std::integral_constant<Form, Form::int8>{});
  if (form == Form::int4) return with_form(std::integral_constant<Form, Form::int4>{});
  with_form(std::integral_constant<Form, Form::fp8>{});
}

void write_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
              const Tensor& slot_mapping) {
  write_plain(k, v, nullptr, k_cache, v_cache, slot_mapping);
}

void rope_write_kv(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions, const Tensor& cos_sin,
                   const Tensor& k_cache, const Tensor& v_cache, const Tensor& slot_mapping) {
  const Rotation by{q, positions, cos_sin};
  write_plain(k, v, &by, k_cache, v_cache, slot_mapping);
}

void write_quantized_kv(const Tensor& k, const Tensor& v, std::string kv_dtype, const Tensor& k_codes,
                        const Tensor& v_codes, const Tensor& k_scales, const Tensor& v_scales,
                        const Tensor& slot_mapping) {
  write_codes(k, v, nullptr, kv_dtype, k_codes, v_codes, k_scales, v_scales, slot_mapping);
}

void rope_write_quantized_kv(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions,
                             const Tensor& cos_sin, std::string kv_dtype, const Tensor& k_codes, const Tensor& v_codes,
                             const Tensor& k_scales, const Tensor& v_scales, const Tensor& slot_mapping) {
  const Rotation by{q, positions, cos_sin};
  write_codes(k, v, &by, kv_dtype, k_codes, v_codes, k_scales, v_scales, slot_mapping);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def("rope(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor cos_sin) -> ()");
  library.def("write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()");
  library.def(
      "rope_write_kv(Tensor(a!) q, Tensor k, Tensor v, Tensor positions, Tensor cos_sin, Tensor(b!) k_cache, "
      "Tensor(c!) v_cache, Tensor slot_mapping) -> ()");
  library.def(
      "write_quantized_kv(Tensor k, Tensor v, str kv_dtype, Tensor(a!) k_codes, Tensor(b!) v_codes, "
      "Tensor(c!) k_scales, Tensor(d!) v_scales, Tensor slot_mapping) -> ()");
  library.def(
      "rope_write_quantized_kv(Tensor(a!) q, Tensor k, Tensor v, Tensor positions, Tensor cos_sin, str kv_dtype, "
      "Tensor(b!) k_codes, Tensor(c!) v_codes, Tensor(d!) k_scales, Tensor(e!) v_scales, Tensor slot_mapping) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("rope", TORCH_BOX(&rope));
  library.impl("write_kv", TORCH_BOX(&write_kv));
  library.impl("rope_write_kv", TORCH_BOX(&rope_write_kv));
  library.impl("write_quantized_kv", TORCH_BOX(&write_quantized_kv));
  library.impl("rope_write_quantized_kv", TORCH_BOX(&rope_write_quantized_kv));
}

}  // namespace cuda_ops
