// What the attention kernels read and write, and who is computed by which. Contract: engines/ops/attention.py.
//
// Letters: R rows of a tile, D head_dim, G query heads of a KV head. A row is one query head of one token: the rows of a
// sequence and KV head are its tokens' G heads end to end, so that one tile of the tensor cores holds all queries that
// share keys (grouped-query attention, arXiv 2305.13245).
#pragma once

#include <cstdint>

#include "kv_codes.cuh"

// Head dimensions that kernels are compiled for; multiples of 16.
#ifndef CUDA_OPS_HEAD_DIMS
#define CUDA_OPS_HEAD_DIMS(X) X(64) X(80) X(96) X(128) X(256)
#endif

namespace cuda_ops {

struct AttentionParams {
  const void* q;                // [num_tokens, num_heads, D], the last dimension dense
  const void* k_cache;          // [num_blocks, num_kv_heads, block_size, D], or its codes: kv_codes.cuh
  const void* v_cache;          // the same
  const float* k_scales;        // [num_blocks, num_kv_heads, block_size, 2 or 1], of codes only
  const float* v_scales;        // the same
  const int32_t* cu_seqlens_q;  // [num_seqs + 1]
  const int32_t* seq_lens;      // [num_seqs]
  const int32_t* block_tables;  // [num_seqs, table_stride]
  const float* sinks;           // [num_heads] or null
  void* out;                    // [num_tokens, num_heads, D]
  float* partial;               // [num_seqs * num_kv_heads * row_tiles, max_splits, min(group, 16), D + 2], decode only
  int* arrived;                 // [num_seqs * num_kv_heads * row_tiles], zero before and after, decode only
  int64_t q_token_stride, q_head_stride;
  int num_seqs, num_heads, num_kv_heads, group, block_shift, table_stride;
  int row_tiles;   // of 16 rows that hold a KV head's queries of one token
  int max_splits;  // of any sequence
  int window;      // 0: none
  Form form;       // of codes
  float scale, softcap;
};

constexpr int kDecodeRows = 16;
// Keys that one block of threads takes of a decoding sequence, at fixed positions: so a token's bits do not depend on
// what else is in the batch. 512 keys of D = 128 are 256 KiB; what is written and read for them is under 2% of that.
constexpr int kSplitKeys = 512;

}  // namespace cuda_ops
