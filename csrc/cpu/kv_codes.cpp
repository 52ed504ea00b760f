// The op write_quantized_kv: checks, and tokens shared out among torch's threads. Layouts are those of
// engines/ops/kv_cache.py.

#include "kv_codes.h"

#include <torch/csrc/stable/library.h>

#include "codes_tensors.h"
#include "rows.h"
#include "tensors.h"

namespace cpu_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Vectors vectors_of(const Tensor& x, const Tensor& cache, const Tensor& scales, const int64_t* slots, Codes codes,
                   const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) <= 1), name,
                  ": expected [num_tokens, heads, head_dim], the last dimension contiguous");
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

void write_quantized_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& k_scales, const Tensor& v_scales, const Tensor& slot_mapping, int64_t kind) {
  STD_TORCH_CHECK(slot_mapping.scalar_type() == ScalarType::Long && slot_mapping.dim() == 1 &&
                      slot_mapping.is_contiguous() && slot_mapping.size(0) == k.size(0) && v.size(0) == k.size(0),
                  "slot_mapping: expected a contiguous int64 a token, and as many values as keys");
  const int64_t* slots = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  const Codes codes = codes_of(kind);
  const Vectors keys = vectors_of(k, k_cache, k_scales, slots, codes, "k");
  const Vectors values = vectors_of(v, v_cache, v_scales, slots, codes, "v");
  STD_TORCH_CHECK(v_cache.size(0) == k_cache.size(0) && v_cache.size(2) == k_cache.size(2),
                  "v: expected a cache of as many blocks as that of keys");
  const int64_t limit = k_cache.size(0) * k_cache.size(2);
  for (int64_t i = 0; i < k.size(0); ++i)
    STD_TORCH_CHECK(slots[i] >= 0 && slots[i] < limit, "slot_mapping: ", slots[i], "; expected 0 to ", limit - 1);
  const auto op = CPU_OPS_PICK(quantize_vectors);
  for_rows(k.size(0), 2 * keys.num_heads * keys.head_dim, [&](int64_t first, int64_t last) {
    op(keys, first, last);
    op(values, first, last);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) {
  library.def(
      "write_quantized_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_scales, "
      "Tensor(d!) v_scales, Tensor slot_mapping, int kind) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) { library.impl("write_quantized_kv", TORCH_BOX(&write_quantized_kv)); }

}  // namespace cpu_ops
