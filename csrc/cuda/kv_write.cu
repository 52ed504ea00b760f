// The op write_quantized_kv: checks and launch.

#include "kv_write.cuh"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

#include "tensors.h"

namespace cuda_ops {
namespace {

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

void write_quantized_kv(const Tensor& k, const Tensor& v, std::string kv_dtype, const Tensor& k_codes,
                        const Tensor& v_codes, const Tensor& k_scales, const Tensor& v_scales,
                        const Tensor& slot_mapping) {
  check_dense_rows(k, 3, "k");
  check_dense_rows(v, 3, "v");
  check_like(v, k, "v", "k");
  for (int dim = 0; dim < 3; ++dim) check_size(v, dim, k.size(dim), "v");
  const Form form = form_of(kv_dtype);
  check_codes(k_codes, k_scales, k, form, "k_codes");
  check_codes(v_codes, v_scales, k, form, "v_codes");
  check_size(v_codes, 2, k_codes.size(2), "v_codes");
  const int64_t tokens = k.size(0);
  const int64_t* slots = int64s(slot_mapping, tokens, "slot_mapping");
  if (tokens == 0) return;
  const Place place(k.get_device_index());
  with_float(k, "k", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    CodesWriteParams<T> p{};
    p.k = data<T>(k);
    p.v = data<T>(v);
    p.k_codes = mutable_data<uint8_t>(k_codes);
    p.v_codes = mutable_data<uint8_t>(v_codes);
    p.k_scales = mutable_data<float>(k_scales);
    p.v_scales = mutable_data<float>(v_scales);
    p.slot_mapping = slots;
    p.k_token_stride = k.stride(0);
    p.k_head_stride = k.stride(1);
    p.v_token_stride = v.stride(0);
    p.v_head_stride = v.stride(1);
    p.num_slots = std::min(k_codes.size(0), v_codes.size(0)) * k_codes.size(2);
    p.num_kv_heads = static_cast<int>(k.size(1));
    p.block_size = static_cast<int>(k_codes.size(2));
    p.head_dim = static_cast<int>(k.size(2));
    p.form = form;
    launch(codes_write_kernel<T>, dim3(static_cast<unsigned>(tokens)), dim3(kWriteWarps * 32), 0, place, p);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def(
      "write_quantized_kv(Tensor k, Tensor v, str kv_dtype, Tensor(a!) k_codes, Tensor(b!) v_codes, "
      "Tensor(c!) k_scales, Tensor(d!) v_scales, Tensor slot_mapping) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("write_quantized_kv", TORCH_BOX(&write_quantized_kv));
}

}  // namespace cuda_ops
