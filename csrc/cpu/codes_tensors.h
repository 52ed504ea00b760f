// Tensors of a cache in 8 or 4 bits, as engines/ops/kv_cache.py has them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "attention.h"

namespace cpu_ops {

// engines/cpu/compiled.py numbers them.
inline Codes codes_of(int64_t kind) {
  STD_TORCH_CHECK(kind >= 1 && kind <= 3, "kind: ", kind, "; expected 1 (int8), 2 (int4) or 3 (fp8)");
  return static_cast<Codes>(kind);
}

inline void check_codes(const torch::stable::Tensor& cache, const torch::stable::Tensor& scales, Codes codes,
                        int64_t heads, int64_t head_dim, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType type = codes == Codes::fp8 ? ScalarType::Float8_e4m3fn : ScalarType::Byte;
  STD_TORCH_CHECK(cache.scalar_type() == type && cache.dim() == 4 && cache.is_contiguous() && cache.size(1) == heads &&
                      cache.size(3) == (codes == Codes::int4 ? (head_dim + 1) / 2 : head_dim),
                  name, ": expected contiguous codes [num_blocks, num_kv_heads, block_size, bytes of a vector]");
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.dim() == 4 && scales.is_contiguous() &&
                      scales.size(0) == cache.size(0) && scales.size(1) == heads && scales.size(2) == cache.size(2) &&
                      scales.size(3) == (codes == Codes::fp8 ? 1 : 2),
                  name, ": expected contiguous float32 scales, and offsets but for fp8, one of each a vector of codes");
}

}  // namespace cpu_ops
