// Launches of the attention kernels, one source each, so that they compile side by side.
#pragma once

#include <primitives.cuh>

#include "attention.h"
#include "tensors.h"

namespace cuda_ops {

// head_dim is one of CUDA_OPS_HEAD_DIMS. grid_x: blocks along the pieces of work.
void launch_decode(ScalarType type, int head_dim, int grid_x, const Place& place, const AttentionParams& params);
void launch_decode_coded(ScalarType type, int head_dim, int grid_x, const Place& place, const AttentionParams& params);
// num_tokens: bound for those of sequences with more than one new token.
void launch_prefill(ScalarType type, int head_dim, int64_t num_tokens, const Place& place,
                    const AttentionParams& params);
void launch_prefill_coded(ScalarType type, int head_dim, int64_t num_tokens, const Place& place,
                          const AttentionParams& params);

// For sm_90 devices, head_dim 64 or 128 and blocks of 8 keys or more: what its instructions take.
inline bool sm90_takes(int device, int head_dim, int block_shift) {
#ifdef CUDA_OPS_SM90
  return compute_capability(device) == 90 && (head_dim == 64 || head_dim == 128) && block_shift >= 3;
#else
  return false;
#endif
}
void launch_prefill_sm90(ScalarType type, int head_dim, int64_t num_blocks, int64_t num_tokens, const Place& place,
                         const AttentionParams& params);

// Calls function(head_dim as a constant) if it is one that kernels were compiled for, else raises.
template <class Function> void with_head_dim(int head_dim, const Function& function) {
#define CUDA_OPS_CASE(D) \
  if (head_dim == D) return function(std::integral_constant<int, D>{});
  CUDA_OPS_HEAD_DIMS(CUDA_OPS_CASE)
#undef CUDA_OPS_CASE
#define CUDA_OPS_NAME(D) " " #D
  STD_TORCH_CHECK(false, "head_dim: ", head_dim, "; expected one of" CUDA_OPS_HEAD_DIMS(CUDA_OPS_NAME));
#undef CUDA_OPS_NAME
}

}  // namespace cuda_ops
