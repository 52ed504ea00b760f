// What the ops of kv_write.cpp put together: each checks its tensors, and gives what is to be done for a run of tokens.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <functional>

namespace cpu_ops {

using Run = std::function<void(int64_t first, int64_t last)>;

// Layouts are those of engines/ops/kv_cache.py; what points into tensors lives as long as they do.
Run write_plain(const torch::stable::Tensor& k, const torch::stable::Tensor& v, const torch::stable::Tensor& k_cache,
                const torch::stable::Tensor& v_cache, const int64_t* slots);
Run write_packed(const torch::stable::Tensor& k, const torch::stable::Tensor& v, const torch::stable::Tensor& k_cache,
                 const torch::stable::Tensor& v_cache, const int64_t* slots);
Run write_codes(const torch::stable::Tensor& k, const torch::stable::Tensor& v, const torch::stable::Tensor& k_cache,
                const torch::stable::Tensor& v_cache, const torch::stable::Tensor& k_scales,
                const torch::stable::Tensor& v_scales, const int64_t* slots, int64_t kind);

inline void check_heads(const torch::stable::Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) <= 1), name,
                  ": expected [num_tokens, heads, head_dim], the last dimension contiguous");
}

}  // namespace cpu_ops
