// Keys and values into a cache of codes.

#include "kv_codes.h"

#include "codes_tensors.h"
#include "kv_write.h"
#include "rows.h"
#include "tensors.h"

namespace cpu_ops {
namespace {

using torch::stable::Tensor;

Vectors vectors_of(const Tensor& x, const Tensor& cache, const Tensor& scales, const int64_t* slots, Codes codes,
                   const char* name) {
  check_heads(x, name);
  check_codes(cache, scales, codes, x.size(1), x.size(2), name);
  return {type_of(x, name),
          codes,
          x.size(2),
          x.size(1),
          x.stride(0),
          x.stride(1),
          x.const_data_ptr(),
          slots,
          cache.size(2),
          cache.size(3),
          scales.size(3),
          static_cast<char*>(cache.mutable_data_ptr()),
          static_cast<float*>(scales.mutable_data_ptr())};
}

}  // namespace

Run write_codes(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_scales,
                const Tensor& v_scales, const int64_t* slots, int64_t kind) {
  const Codes codes = codes_of(kind);
  const Vectors keys = vectors_of(k, k_cache, k_scales, slots, codes, "k");
  const Vectors values = vectors_of(v, v_cache, v_scales, slots, codes, "v");
  const auto op = CPU_OPS_PICK(quantize_vectors);
  return [=](int64_t first, int64_t last) {
    op(keys, first, last);
    op(values, first, last);
  };
}

}  // namespace cpu_ops
