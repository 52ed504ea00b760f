// The ops latent_attention and write_latent: checks, and how many rows a block of threads takes.

#include "latent_attention.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "tensors.h"

namespace cuda_ops {
namespace {

// Work of at most this many blocks a multiprocessor is launched; blocks go on to what is left.
constexpr int64_t kBlocksPerMultiprocessor = 4;

template <class T, int RANK, int ROPE, int M>
void run(const Tensor& q, int64_t max_seqlen_k, const Place& place, LatentParams p, const Tensor& arrived) {
  using Shape = LatentShape<RANK, ROPE, M>;
  const int64_t rows = q.size(0) * q.size(1), num_seqs = p.num_seqs;
  p.decode_tiles = static_cast<int>(ceil_div(p.num_heads, Shape::kRows));
  p.max_splits = static_cast<int>(ceil_div(max_seqlen_k, kLatentSplit));
  const int64_t cells = num_seqs * p.decode_tiles;
  STD_TORCH_CHECK(arrived.scalar_type() == ScalarType::Int && arrived.is_contiguous() && arrived.numel() >= cells,
                  "arrived: expected at least ", cells, " int32");
  p.arrived = mutable_data<int32_t>(arrived);
  Tensor partial = torch::stable::new_empty(
      q, {p.max_splits > 1 ? cells * p.max_splits * Shape::kRows * (RANK + 2) : 0}, ScalarType::Float);
  p.partial = mutable_data<float>(partial);
  const int64_t most = cells * p.max_splits + ceil_div(rows, Shape::kRows) + num_seqs;
  const int64_t grid = std::min(most, kBlocksPerMultiprocessor * multiprocessors(place.device));
  launch(latent_kernel<T, RANK, ROPE, M>, dim3(static_cast<unsigned>(grid)), dim3(Shape::kThreads),
         Shape::kSharedBytes, place, p);
}

// Rows of a block: as many as one token has, or 64 where tokens are many; fewer where shared memory holds no more.
template <class T, int RANK, int ROPE>
void run_sized(const Tensor& q, int64_t max_seqlen_q, int64_t max_seqlen_k, const Place& place, const LatentParams& p,
               const Tensor& arrived) {
  const int64_t rows = q.size(1) * std::max<int64_t>(max_seqlen_q, 1);
  const int limit = shared_memory_limit(place.device);
  if (rows > 32 && LatentShape<RANK, ROPE, 4>::kSharedBytes <= limit)
    return run<T, RANK, ROPE, 4>(q, max_seqlen_k, place, p, arrived);
  if (rows > 16 && LatentShape<RANK, ROPE, 2>::kSharedBytes <= limit)
    return run<T, RANK, ROPE, 2>(q, max_seqlen_k, place, p, arrived);
  run<T, RANK, ROPE, 1>(q, max_seqlen_k, place, p, arrived);
}

// arrived: int32 zeros, num_seqs * ceil(num_heads / 16) or more; zeros again afterwards.
// max_seqlen_q, max_seqlen_k: bounds of the new and of all tokens of a sequence.
Tensor latent_attention(const Tensor& q, const Tensor& cache, int64_t rank, const Tensor& cu_seqlens_q,
                        const Tensor& seq_lens, const Tensor& block_tables, const Tensor& arrived,
                        int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale) {
  STD_TORCH_CHECK(q.dim() == 3 && q.is_contiguous() && divides_16(q),
                  "q: expected [num_tokens, num_heads, size], contiguous");
  check_like(cache, q, "cache", "q");
  STD_TORCH_CHECK(cache.dim() == 3 && cache.is_contiguous() && divides_16(cache) && cache.size(2) == q.size(2),
                  "cache: expected [num_blocks, block_size, ", q.size(2), "], contiguous");
  const int64_t num_seqs = seq_lens.size(0), block_size = cache.size(1);
  STD_TORCH_CHECK(block_tables.scalar_type() == ScalarType::Int && block_tables.dim() == 2 &&
                      block_tables.is_contiguous() && block_tables.size(0) == num_seqs,
                  "block_tables: expected [", num_seqs, ", max_blocks] int32, contiguous");
  STD_TORCH_CHECK(block_tables.size(1) * block_size >= max_seqlen_k, "block_tables: ", block_tables.size(1),
                  " blocks of ", block_size, "; expected room for ", max_seqlen_k, " tokens");
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), rank});
  LatentParams p{};
  p.q = q.const_data_ptr();
  p.cache = cache.const_data_ptr();
  p.cu_seqlens_q = int32s(cu_seqlens_q, num_seqs + 1, "cu_seqlens_q");
  p.seq_lens = int32s(seq_lens, num_seqs, "seq_lens");
  p.block_tables = data<int32_t>(block_tables);
  p.out = out.mutable_data_ptr();
  p.num_seqs = static_cast<int>(num_seqs);
  p.num_heads = static_cast<int>(q.size(1));
  p.table_stride = static_cast<int>(block_tables.size(1));
  p.block_size = static_cast<int>(block_size);
  p.scale = static_cast<float>(softmax_scale);
  if (out.numel() == 0 || num_seqs == 0) return out;
  const Place place(q.get_device_index());
  bool taken = false;
  with_half(q.scalar_type(), "q", [&]<class Tagged>(Tagged) {
#define CUDA_OPS_CASE(RANK, ROPE)                                                                                \
  if (rank == RANK && q.size(2) == RANK + ROPE) {                                                                \
    run_sized<typename Tagged::type, RANK, ROPE>(q, max_seqlen_q, max_seqlen_k, place, p, arrived);              \
    taken = true;                                                                                                \
  }
    CUDA_OPS_LATENTS(CUDA_OPS_CASE)
#undef CUDA_OPS_CASE
  });
#define CUDA_OPS_NAME(RANK, ROPE) " " #RANK " and " #ROPE
  STD_TORCH_CHECK(taken, "q: a latent of ", rank, " and a rotated key of ", q.size(2) - rank,
                  "; expected" CUDA_OPS_LATENTS(CUDA_OPS_NAME));
#undef CUDA_OPS_NAME
  return out;
}

template <class Unit>
void write(const Tensor& latent, const Tensor& cache, const int64_t* slots, int64_t unit, const Place& place) {
  const LatentWriteParams<Unit> p{static_cast<const Unit*>(latent.const_data_ptr()),
                                  static_cast<Unit*>(cache.mutable_data_ptr()), slots, latent.stride(0) / unit,
                                  cache.size(0) * cache.size(1), static_cast<int>(latent.size(1) / unit)};
  launch(latent_write_kernel<Unit>, dim3(static_cast<unsigned>(latent.size(0))), dim3(128), 0, place, p);
}

void write_latent(const Tensor& latent, const Tensor& cache, const Tensor& slot_mapping) {
  check_dense_rows(latent, 2, "latent");
  check_like(cache, latent, "cache", "latent");
  STD_TORCH_CHECK(cache.dim() == 3 && cache.is_contiguous() && cache.size(2) == latent.size(1),
                  "cache: expected [num_blocks, block_size, ", latent.size(1), "], contiguous");
  const int64_t* slots = int64s(slot_mapping, latent.size(0), "slot_mapping");
  if (latent.size(0) == 0) return;
  const Place place(latent.get_device_index());
  with_float(latent, "latent", [&]<class Tagged>(Tagged) {
    constexpr int64_t kSize = sizeof(typename Tagged::type), kUnit = 16 / kSize;
    if (latent.size(1) % kUnit == 0 && latent.stride(0) % kUnit == 0 && divides_16(latent) && divides_16(cache))
      return write<uint4>(latent, cache, slots, kUnit, place);
    if constexpr (kSize == 4) write<uint32_t>(latent, cache, slots, 1, place);
    else write<uint16_t>(latent, cache, slots, 1, place);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def(
      "latent_attention(Tensor q, Tensor cache, int rank, Tensor cu_seqlens_q, Tensor seq_lens, Tensor block_tables, "
      "Tensor(a!) arrived, int max_seqlen_q, int max_seqlen_k, float softmax_scale) -> Tensor");
  library.def("write_latent(Tensor latent, Tensor(a!) cache, Tensor slot_mapping) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("latent_attention", TORCH_BOX(&latent_attention));
  library.impl("write_latent", TORCH_BOX(&write_latent));
}

}  // namespace cuda_ops
