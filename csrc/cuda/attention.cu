// The ops paged_attention and quantized_attention: checks, and which kernel takes which sequences.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <string>

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

void check_codes(const Tensor& codes, const Tensor& scales, const Tensor& q, Form form, const char* name,
                 const char* name_of_scales) {
  const int64_t width = kv_width(form, static_cast<int>(q.size(2))), numbers = kv_numbers(form);
  STD_TORCH_CHECK(codes.get_device_index() == q.get_device_index() && codes.scalar_type() == ScalarType::Byte, name,
                  ": expected uint8 on the device of q");
  STD_TORCH_CHECK(codes.dim() == 4 && codes.is_contiguous() && divides_16(codes) && codes.size(3) == width, name,
                  ": expected [num_blocks, num_kv_heads, block_size, ", width, "], contiguous");
  STD_TORCH_CHECK(std::has_single_bit(static_cast<uint64_t>(codes.size(2))), name, ": block_size is ", codes.size(2),
                  "; expected a power of two");
  STD_TORCH_CHECK(scales.get_device_index() == q.get_device_index() && scales.scalar_type() == ScalarType::Float &&
                      scales.dim() == 4 && scales.is_contiguous() && divides_16(scales) &&
                      scales.size(0) == codes.size(0) && scales.size(1) == codes.size(1) &&
                      scales.size(2) == codes.size(2) && scales.size(3) == numbers,
                  name_of_scales, ": expected [num_blocks, num_kv_heads, block_size, ", numbers,
                  "] float32, contiguous, on the device of q");
}

// Which tokens of which sequences attend, and how.
struct Asked {
  const Tensor &cu_seqlens_q, &seq_lens, &block_tables;
  const std::optional<Tensor>& sinks;
  const Tensor& arrived;  // int32 zeros, num_seqs * num_kv_heads * ceil(group / 16) or more; zeros again afterwards
  int64_t max_seqlen_q, max_seqlen_k;  // bounds of the new and of all tokens of a sequence
  double softmax_scale;
  int64_t window_size;
  double softcap;
};

// p: has the cache. k_cache: [num_blocks, num_kv_heads, block_size, ...].
Tensor attend(const Tensor& q, AttentionParams p, const Tensor& k_cache, const Asked& asked) {
  const int64_t num_tokens = q.size(0), num_heads = q.size(1), head_dim = q.size(2);
  const int64_t num_seqs = asked.seq_lens.size(0);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(q.const_data_ptr()) % 4 == 0 &&
                      (num_tokens <= 1 || q.stride(0) % 2 == 0) && (num_heads <= 1 || q.stride(1) % 2 == 0),
                  "q: expected heads at addresses that 4 divides; call clone()");
  const int64_t num_kv_heads = k_cache.size(1), block_size = k_cache.size(2);
  STD_TORCH_CHECK(num_kv_heads > 0 && num_heads % num_kv_heads == 0, "q: ", num_heads, " heads; expected a multiple of ",
                  num_kv_heads);
  const Tensor& tables = asked.block_tables;
  STD_TORCH_CHECK(tables.scalar_type() == ScalarType::Int && tables.dim() == 2 && tables.is_contiguous() &&
                      tables.size(0) == num_seqs,
                  "block_tables: expected [", num_seqs, ", max_blocks] int32, contiguous");
  STD_TORCH_CHECK(tables.size(1) * block_size >= asked.max_seqlen_k, "block_tables: ", tables.size(1), " blocks of ",
                  block_size, "; expected room for ", asked.max_seqlen_k, " tokens");

  Tensor out = torch::stable::new_empty(q, {num_tokens, num_heads, head_dim});
  p.q = q.const_data_ptr();
  p.cu_seqlens_q = int32s(asked.cu_seqlens_q, num_seqs + 1, "cu_seqlens_q");
  p.seq_lens = int32s(asked.seq_lens, num_seqs, "seq_lens");
  p.block_tables = data<int32_t>(tables);
  if (asked.sinks) {
    STD_TORCH_CHECK(asked.sinks->scalar_type() == ScalarType::Float, "sinks: expected float32");
    check_vector(*asked.sinks, num_heads, "sinks");
    p.sinks = data<float>(*asked.sinks);
  }
  p.out = out.mutable_data_ptr();
  p.q_token_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.num_seqs = static_cast<int>(num_seqs);
  p.num_heads = static_cast<int>(num_heads);
  p.num_kv_heads = static_cast<int>(num_kv_heads);
  p.group = static_cast<int>(num_heads / num_kv_heads);
  p.block_shift = std::countr_zero(static_cast<uint64_t>(block_size));
  p.table_stride = static_cast<int>(tables.size(1));
  p.row_tiles = static_cast<int>(ceil_div(p.group, kDecodeRows));
  p.max_splits = static_cast<int>(ceil_div(asked.max_seqlen_k, kSplitKeys));
  p.window = static_cast<int>(asked.window_size);
  p.scale = static_cast<float>(asked.softmax_scale);
  p.softcap = static_cast<float>(asked.softcap);
  if (num_tokens == 0 || num_seqs == 0) return out;

  const Place place(q.get_device_index());
  const int64_t cells = num_seqs * num_kv_heads * p.row_tiles;
  STD_TORCH_CHECK(asked.arrived.scalar_type() == ScalarType::Int && asked.arrived.is_contiguous() &&
                      asked.arrived.numel() >= cells,
                  "arrived: expected at least ", cells, " int32");
  p.arrived = mutable_data<int32_t>(asked.arrived);
  Tensor partial = torch::stable::new_empty(
      q, {p.max_splits > 1 ? cells * p.max_splits * std::min(p.group, kDecodeRows) * (head_dim + 2) : 0},
      ScalarType::Float);
  p.partial = mutable_data<float>(partial);
  const int64_t columns = num_kv_heads * p.row_tiles, wanted = ceil_div(16 * multiprocessors(place.device), columns);
  const int grid_x = static_cast<int>(std::min(num_seqs * p.max_splits, std::max<int64_t>(wanted, 1)));
  const int size = static_cast<int>(head_dim);
  const bool coded = p.k_scales != nullptr;
  (coded ? launch_decode_coded : launch_decode)(q.scalar_type(), size, grid_x, place, p);
  if (asked.max_seqlen_q <= 1) return out;
#ifdef CUDA_OPS_SM90
  if (!coded && sm90_takes(place.device, size, p.block_shift)) {
    launch_prefill_sm90(q.scalar_type(), size, k_cache.size(0), num_tokens, place, p);
    return out;
  }
#endif
  (coded ? launch_prefill_coded : launch_prefill)(q.scalar_type(), size, num_tokens, place, p);
  return out;
}

Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cu_seqlens_q,
                       const Tensor& seq_lens, const Tensor& block_tables, const std::optional<Tensor>& sinks,
                       const Tensor& arrived, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                       int64_t window_size, double softcap) {
  check_dense_rows(q, 3, "q");
  check_cache(k_cache, q, "k_cache");
  check_cache(v_cache, q, "v_cache");
  AttentionParams p{};
  p.k_cache = k_cache.const_data_ptr();
  p.v_cache = v_cache.const_data_ptr();
  return attend(q, p, k_cache, {cu_seqlens_q, seq_lens, block_tables, sinks, arrived, max_seqlen_q, max_seqlen_k,
                                softmax_scale, window_size, softcap});
}

Tensor quantized_attention(const Tensor& q, std::string kv_dtype, const Tensor& k_codes, const Tensor& v_codes,
                           const Tensor& k_scales, const Tensor& v_scales, const Tensor& cu_seqlens_q,
                           const Tensor& seq_lens, const Tensor& block_tables, const std::optional<Tensor>& sinks,
                           const Tensor& arrived, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                           int64_t window_size, double softcap) {
  check_dense_rows(q, 3, "q");
  AttentionParams p{};
  p.form = form_of(kv_dtype);
  check_codes(k_codes, k_scales, q, p.form, "k_codes", "k_scales");
  check_codes(v_codes, v_scales, q, p.form, "v_codes", "v_scales");
  p.k_cache = k_codes.const_data_ptr();
  p.v_cache = v_codes.const_data_ptr();
  p.k_scales = data<float>(k_scales);
  p.v_scales = data<float>(v_scales);
  return attend(q, p, k_codes, {cu_seqlens_q, seq_lens, block_tables, sinks, arrived, max_seqlen_q, max_seqlen_k,
                                softmax_scale, window_size, softcap});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor seq_lens, "
      "Tensor block_tables, Tensor? sinks, Tensor(a!) arrived, int max_seqlen_q, int max_seqlen_k, "
      "float softmax_scale, int window_size, float softcap) -> Tensor");
  library.def(
      "quantized_attention(Tensor q, str kv_dtype, Tensor k_codes, Tensor v_codes, Tensor k_scales, Tensor v_scales, "
      "Tensor cu_seqlens_q, Tensor seq_lens, Tensor block_tables, Tensor? sinks, Tensor(a!) arrived, int max_seqlen_q, "
      "int max_seqlen_k, float softmax_scale, int window_size, float softcap) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("paged_attention", TORCH_BOX(&paged_attention));
  library.impl("quantized_attention", TORCH_BOX(&quantized_attention));
}

}  // namespace cuda_ops
