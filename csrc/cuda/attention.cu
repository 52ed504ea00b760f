// The op paged_attention: checks, and which kernel takes which sequences.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <optional>

#include "attention_launch.h"

namespace cuda_ops {
namespace {

void check_cache(const Tensor& cache, const Tensor& q, const char* name) {
  check_like(cache, q, name, "q");
  STD_TORCH_CHECK(cache.dim() == 4 && cache.is_contiguous() && divides_16(cache) && cache.size(3) == q.size(2), name,
                  ": expected [num_blocks, num_kv_heads, block_size, ", q.size(2), "], contiguous");
  STD_TORCH_CHECK(std::has_single_bit(static_cast<uint64_t>(cache.size(2))), name, ": block_size is ", cache.size(2),
                  "; expected a power of two");
}

// arrived: int32 zeros, at least num_seqs * num_kv_heads * ceil(group / 16) of them; zeros again afterwards.
// max_seqlen_q, max_seqlen_k: bounds of the new and of all tokens of a sequence.
Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cu_seqlens_q,
                       const Tensor& seq_lens, const Tensor& block_tables, const std::optional<Tensor>& sinks,
                       const Tensor& arrived, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                       int64_t window_size, double softcap) {
  check_dense_rows(q, 3, "q");
  const int64_t num_tokens = q.size(0), num_heads = q.size(1), head_dim = q.size(2), num_seqs = seq_lens.size(0);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(q.const_data_ptr()) % 4 == 0 &&
                      (num_tokens <= 1 || q.stride(0) % 2 == 0) && (num_heads <= 1 || q.stride(1) % 2 == 0),
                  "q: expected heads at addresses that 4 divides; call clone()");
  check_cache(k_cache, q, "k_cache");
  check_cache(v_cache, q, "v_cache");
  const int64_t num_kv_heads = k_cache.size(1), block_size = k_cache.size(2);
  STD_TORCH_CHECK(num_kv_heads > 0 && num_heads % num_kv_heads == 0, "q: ", num_heads, " heads; expected a multiple of ",
                  num_kv_heads);
  STD_TORCH_CHECK(block_tables.scalar_type() == ScalarType::Int && block_tables.dim() == 2 &&
                      block_tables.is_contiguous() && block_tables.size(0) == num_seqs,
                  "block_tables: expected [", num_seqs, ", max_blocks] int32, contiguous");
  STD_TORCH_CHECK(block_tables.size(1) * block_size >= max_seqlen_k, "block_tables: ", block_tables.size(1),
                  " blocks of ", block_size, "; expected room for ", max_seqlen_k, " tokens");

  Tensor out = torch::stable::new_empty(q, {num_tokens, num_heads, head_dim});
  AttentionParams p{};
  p.q = q.const_data_ptr();
  p.k_cache = k_cache.const_data_ptr();
  p.v_cache = v_cache.const_data_ptr();
  p.cu_seqlens_q = int32s(cu_seqlens_q, num_seqs + 1, "cu_seqlens_q");
  p.seq_lens = int32s(seq_lens, num_seqs, "seq_lens");
  p.block_tables = data<int32_t>(block_tables);
  if (sinks) {
    STD_TORCH_CHECK(sinks->scalar_type() == ScalarType::Float, "sinks: expected float32");
    check_vector(*sinks, num_heads, "sinks");
    p.sinks = data<float>(*sinks);
  }
  p.out = out.mutable_data_ptr();
  p.q_token_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.num_seqs = static_cast<int>(num_seqs);
  p.num_heads = static_cast<int>(num_heads);
  p.num_kv_heads = static_cast<int>(num_kv_heads);
  p.group = static_cast<int>(num_heads / num_kv_heads);
  p.block_shift = std::countr_zero(static_cast<uint64_t>(block_size));
  p.table_stride = static_cast<int>(block_tables.size(1));
  p.row_tiles = static_cast<int>(ceil_div(p.group, kDecodeRows));
  p.max_splits = static_cast<int>(ceil_div(max_seqlen_k, kSplitKeys));
  p.window = static_cast<int>(window_size);
  p.scale = static_cast<float>(softmax_scale);
  p.softcap = static_cast<float>(softcap);
  if (num_tokens == 0 || num_seqs == 0) return out;

  const Place place(q.get_device_index());
  const int64_t cells = num_seqs * num_kv_heads * p.row_tiles;
  STD_TORCH_CHECK(arrived.scalar_type() == ScalarType::Int && arrived.is_contiguous() && arrived.numel() >= cells,
                  "arrived: expected at least ", cells, " int32");
  p.arrived = mutable_data<int32_t>(arrived);
  Tensor partial = torch::stable::new_empty(
      q, {p.max_splits > 1 ? cells * p.max_splits * kDecodeRows * (head_dim + 2) : 0}, ScalarType::Float);
  p.partial = mutable_data<float>(partial);
  const int64_t columns = num_kv_heads * p.row_tiles, wanted = ceil_div(16 * multiprocessors(place.device), columns);
  const int64_t grid_x = std::min(num_seqs * p.max_splits, std::max<int64_t>(wanted, 1));
  launch_decode(q.scalar_type(), static_cast<int>(head_dim), static_cast<int>(grid_x), place, p);
  if (max_seqlen_q <= 1) return out;
#ifdef CUDA_OPS_SM90
  if (sm90_takes(place.device, static_cast<int>(head_dim), p.block_shift)) {
    launch_prefill_sm90(q.scalar_type(), static_cast<int>(head_dim), k_cache.size(0), num_tokens, place, p);
    return out;
  }
#endif
  launch_prefill(q.scalar_type(), static_cast<int>(head_dim), num_tokens, place, p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor seq_lens, "
      "Tensor block_tables, Tensor? sinks, Tensor(a!) arrived, int max_seqlen_q, int max_seqlen_k, "
      "float softmax_scale, int window_size, float softcap) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("paged_attention", TORCH_BOX(&paged_attention));
}

}  // namespace cuda_ops
