// The op write_kv_packed: new keys and values into a packed cache (packed.h).

#include "packed.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "tensors.h"

namespace cpu_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTokensPerThread = 16;

void write_key(char* block, const char* key, int64_t slot, int64_t block_size, int64_t D) {
  char* to = block + slot / kPackedKeys * kPackedTile + slot % kPackedKeys * 4;
  for (int64_t d = 0; d < D; d += 32, key += 64, to += block_size / kPackedKeys * kPackedTile)
    for (int64_t i = 0; i < 16; ++i) std::memcpy(to + i * 64, key + i * 4, 4);
}

void write_value(char* block, const char* value, int64_t slot, int64_t D) {
  char* to = block + slot / kPackedValues * (D / 16) * kPackedTile + slot % kPackedValues / 2 * 64 + slot % 2 * 2;
  for (int64_t d = 0; d < D; d += 16, value += 32, to += kPackedTile)
    for (int64_t i = 0; i < 16; ++i) std::memcpy(to + i * 4, value + i * 2, 2);
}

void check(const Tensor& from, const Tensor& cache, const char* name) {
  STD_TORCH_CHECK(from.dim() == 3 && from.stride(2) == 1 && from.scalar_type() == ScalarType::BFloat16, name,
                  ": expected bfloat16 [num_tokens, num_kv_heads, head_dim], the last dimension contiguous");
  STD_TORCH_CHECK(cache.scalar_type() == ScalarType::BFloat16 && cache.dim() == 4 && cache.is_contiguous() &&
                      cache.size(1) == from.size(1) && cache.size(3) == from.size(2) && cache.size(3) % 32 == 0 &&
                      cache.size(2) % 32 == 0,
                  name, ": expected a contiguous bfloat16 cache of the same heads, head_dim and block_size multiples of 32");
}

void write_kv_packed(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& slot_mapping) {
  check(k, k_cache, "k");
  check(v, v_cache, "v");
  STD_TORCH_CHECK(slot_mapping.scalar_type() == ScalarType::Long && slot_mapping.dim() == 1 &&
                      slot_mapping.is_contiguous() && slot_mapping.size(0) == k.size(0) && v.size(0) == k.size(0) &&
                      v.size(1) == k.size(1) && v.size(2) == k.size(2) && v_cache.size(0) == k_cache.size(0) &&
                      v_cache.size(2) == k_cache.size(2),
                  "slot_mapping: expected a contiguous int64 a token, and v and its cache of k's sizes");
  const int64_t heads = k.size(1), D = k.size(2), block_size = k_cache.size(2), limit = k_cache.size(0) * block_size;
  const int64_t bytes = block_size * D * 2;
  const int64_t* slots = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  for (int64_t i = 0; i < k.size(0); ++i)
    STD_TORCH_CHECK(slots[i] >= 0 && slots[i] < limit, "slot_mapping: ", slots[i], "; expected 0 to ", limit - 1);
  const char *keys = static_cast<const char*>(k.const_data_ptr()), *values = static_cast<const char*>(v.const_data_ptr());
  char *to_k = static_cast<char*>(k_cache.mutable_data_ptr()), *to_v = static_cast<char*>(v_cache.mutable_data_ptr());
  torch::stable::parallel_for(0, k.size(0), kTokensPerThread, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const int64_t block = slots[token] / block_size, slot = slots[token] % block_size;
      for (int64_t head = 0; head < heads; ++head) {
        write_key(to_k + (block * heads + head) * bytes, keys + (token * k.stride(0) + head * k.stride(1)) * 2, slot,
                  block_size, D);
        write_value(to_v + (block * heads + head) * bytes, values + (token * v.stride(0) + head * v.stride(1)) * 2, slot,
                    D);
      }
    }
  });
}

// Whether this machine multiplies by packed caches.
bool packs_kv() { return isa() == Isa::amx; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) {
  library.def("packs_kv() -> bool");
  library.def(
      "write_kv_packed(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) { library.impl("write_kv_packed", TORCH_BOX(&write_kv_packed)); }
STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CompositeExplicitAutograd, library) { library.impl("packs_kv", TORCH_BOX(&packs_kv)); }

}  // namespace cpu_ops
