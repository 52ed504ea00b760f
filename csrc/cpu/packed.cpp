// New keys and values into a packed cache (packed.h), and whether this machine has such caches.

#include "packed.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "isa.h"
#include "kv_write.h"

namespace cpu_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether this machine multiplies by packed caches.
bool packs_kv() { return isa() == Isa::amx; }

void check(const Tensor& from, const Tensor& cache, const char* name) {
  check_heads(from, name);
  STD_TORCH_CHECK(from.scalar_type() == ScalarType::BFloat16 && cache.scalar_type() == ScalarType::BFloat16 &&
                      cache.dim() == 4 && cache.is_contiguous() && cache.size(1) == from.size(1) &&
                      cache.size(3) == from.size(2) && cache.size(3) % 32 == 0 && cache.size(2) % 32 == 0,
                  name, ": expected bfloat16, and a contiguous cache of the same heads, head_dim and block_size multiples of 32");
  STD_TORCH_CHECK(packs_kv(), "packed: this machine has no matrix unit");
}

using Write = void (*)(char* block, int64_t block_size, int64_t slot, const char* from, int64_t stride, int64_t count,
                       int64_t D);

// Tokens of a run that follow each other in one block are written together.
Run write_runs(const Tensor& from, const Tensor& cache, const int64_t* slots, const char* name, Write write) {
  check(from, cache, name);
  const int64_t heads = cache.size(1), block_size = cache.size(2), D = cache.size(3), bytes = block_size * D * 2;
  const int64_t token_stride = from.stride(0) * 2, head_stride = from.stride(1) * 2;
  const char* source = static_cast<const char*>(from.const_data_ptr());
  char* target = static_cast<char*>(cache.mutable_data_ptr());
  return [=](int64_t first, int64_t last) {
    for (int64_t token = first, count; token < last; token += count) {
      const int64_t slot = slots[token] % block_size, most = std::min(last - token, block_size - slot);
      count = 1;
      while (count < most && slots[token + count] == slots[token] + count) ++count;
      for (int64_t head = 0; head < heads; ++head)
        write(target + (slots[token] / block_size * heads + head) * bytes, block_size, slot,
              source + token * token_stride + head * head_stride, token_stride, count, D);
    }
  };
}

}  // namespace

Run write_packed(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const int64_t* slots) {
#if defined(CPU_OPS_X86)
  const Run keys = write_runs(k, k_cache, slots, "k", amx::write_keys);
  const Run values = write_runs(v, v_cache, slots, "v", amx::write_values);
  return [=](int64_t first, int64_t last) {
    keys(first, last);
    values(first, last);
  };
#else
  STD_TORCH_CHECK(false, "packed: this machine has no matrix unit");
#endif
}

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) { library.def("packs_kv() -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CompositeExplicitAutograd, library) { library.impl("packs_kv", TORCH_BOX(&packs_kv)); }

}  // namespace cpu_ops
