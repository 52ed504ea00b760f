// The ops that bring new tokens' keys and values into the cache, with and without the rotation before it: rope, write_kv,
// write_quantized_kv, rope_write_kv, rope_write_quantized_kv. A token is rotated and written by one thread, from its cache.

#include "kv_write.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "elementwise.h"
#include "rows.h"
#include "tensors.h"

namespace cpu_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const int64_t* int64s(const Tensor& tensor, const char* name, int64_t size) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.dim() == 1 && tensor.is_contiguous() &&
                      tensor.size(0) == size,
                  name, ": expected a contiguous int64 a token");
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

Rotation rotation_of(const Tensor& x, const int64_t* positions, const Tensor& cos_sin, const char* name) {
  check_heads(x, name);
  const int64_t half = cos_sin.size(1) / 2;
  STD_TORCH_CHECK(x.scalar_type() == cos_sin.scalar_type() && 2 * half <= x.size(2), name,
                  ": expected cos_sin's dtype, and at least rotary_dim values a head");
  return {type_of(x, name),       x.size(1), x.stride(0),            x.stride(1), half,
          x.mutable_data_ptr(), positions, cos_sin.const_data_ptr()};
}

Run rotate(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin) {
  STD_TORCH_CHECK(cos_sin.dim() == 2 && cos_sin.is_contiguous(), "cos_sin: expected [max_position, rotary_dim]");
  const int64_t* at = int64s(positions, "positions", q.size(0));
  for (int64_t i = 0; i < q.size(0); ++i)
    STD_TORCH_CHECK(at[i] >= 0 && at[i] < cos_sin.size(0), "positions: token ", i, " is at ", at[i],
                    "; expected 0 to ", cos_sin.size(0) - 1);
  STD_TORCH_CHECK(k.size(0) == q.size(0), "k: expected q's number of tokens");
  const Rotation of_q = rotation_of(q, at, cos_sin, "q"), of_k = rotation_of(k, at, cos_sin, "k");
  const auto op = CPU_OPS_PICK_BF16(rope, of_q.type);
  return [=](int64_t first, int64_t last) {
    op(of_q, first, last);
    op(of_k, first, last);
  };
}

// Slots of k's tokens, all of them in the cache; v has as many tokens and blocks.
const int64_t* slots_of(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& slot_mapping) {
  const int64_t* slots = int64s(slot_mapping, "slot_mapping", k.size(0));
  STD_TORCH_CHECK(v.size(0) == k.size(0), "v: expected k's number of tokens");
  STD_TORCH_CHECK(k_cache.dim() == 4 && v_cache.dim() == 4 && v_cache.size(0) == k_cache.size(0) &&
                      v_cache.size(2) == k_cache.size(2),
                  "v: expected a cache of as many blocks as that of keys");
  const int64_t limit = k_cache.size(0) * k_cache.size(2);
  for (int64_t i = 0; i < k.size(0); ++i)
    STD_TORCH_CHECK(slots[i] >= 0 && slots[i] < limit, "slot_mapping: ", slots[i], "; expected 0 to ", limit - 1);
  return slots;
}

Run copy(const Tensor& from, const Tensor& cache, const int64_t* slots, const char* name) {
  check_heads(from, name);
  STD_TORCH_CHECK(cache.scalar_type() == from.scalar_type() && cache.dim() == 4 && cache.is_contiguous() &&
                      cache.size(1) == from.size(1) && cache.size(3) == from.size(2),
                  name, ": expected the cache's dtype, heads and head_dim, and a contiguous cache");
  const int64_t element = size_of(type_of(from, name)), heads = cache.size(1), block_size = cache.size(2);
  const int64_t bytes = cache.size(3) * element;
  const int64_t token_stride = from.stride(0) * element, head_stride = from.stride(1) * element;
  const char* source = static_cast<const char*>(from.const_data_ptr());
  char* target = static_cast<char*>(cache.mutable_data_ptr());
  return [=](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const int64_t block = slots[token] / block_size, offset = slots[token] % block_size;
      for (int64_t head = 0; head < heads; ++head)
        std::memcpy(target + ((block * heads + head) * block_size + offset) * bytes,
                    source + token * token_stride + head * head_stride, bytes);
    }
  };
}

Run write_to(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slot_mapping,
             bool packed) {
  const int64_t* slots = slots_of(k, v, k_cache, v_cache, slot_mapping);
  return (packed ? write_packed : write_plain)(k, v, k_cache, v_cache, slots);
}

Run write_codes_to(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                   const Tensor& k_scales, const Tensor& v_scales, const Tensor& slot_mapping, int64_t kind) {
  const int64_t* slots = slots_of(k, v, k_cache, v_cache, slot_mapping);
  return write_codes(k, v, k_cache, v_cache, k_scales, v_scales, slots, kind);
}

int64_t values_of(const Tensor& x) { return x.size(1) * x.size(2); }

void rope(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin) {
  for_rows(q.size(0), values_of(q) + values_of(k), rotate(q, k, positions, cos_sin));
}

void write_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slot_mapping,
              bool packed) {
  for_rows(k.size(0), values_of(k) + values_of(v), write_to(k, v, k_cache, v_cache, slot_mapping, packed));
}

void write_quantized_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& k_scales, const Tensor& v_scales, const Tensor& slot_mapping, int64_t kind) {
  for_rows(k.size(0), values_of(k) + values_of(v),
           write_codes_to(k, v, k_cache, v_cache, k_scales, v_scales, slot_mapping, kind));
}

void one_after_the_other(const Tensor& q, const Tensor& k, const Tensor& v, const Run& rotate, const Run& write) {
  for_rows(q.size(0), values_of(q) + values_of(k) + values_of(v), [&](int64_t first, int64_t last) {
    rotate(first, last);
    write(first, last);
  });
}

void rope_write_kv(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions, const Tensor& cos_sin,
                   const Tensor& k_cache, const Tensor& v_cache, const Tensor& slot_mapping, bool packed) {
  one_after_the_other(q, k, v, rotate(q, k, positions, cos_sin),
                      write_to(k, v, k_cache, v_cache, slot_mapping, packed));
}

void rope_write_quantized_kv(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions,
                             const Tensor& cos_sin, const Tensor& k_cache, const Tensor& v_cache,
                             const Tensor& k_scales, const Tensor& v_scales, const Tensor& slot_mapping, int64_t kind) {
  one_after_the_other(q, k, v, rotate(q, k, positions, cos_sin),
                      write_codes_to(k, v, k_cache, v_cache, k_scales, v_scales, slot_mapping, kind));
}

}  // namespace

Run write_plain(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const int64_t* slots) {
  const Run keys = copy(k, k_cache, slots, "k"), values = copy(v, v_cache, slots, "v");
  return [=](int64_t first, int64_t last) {
    keys(first, last);
    values(first, last);
  };
}

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) {
  library.def("rope(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor cos_sin) -> ()");
  library.def(
      "write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, bool packed) -> ()");
  library.def(
      "write_quantized_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_scales, "
      "Tensor(d!) v_scales, Tensor slot_mapping, int kind) -> ()");
  library.def(
      "rope_write_kv(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor positions, Tensor cos_sin, Tensor(c!) k_cache, "
      "Tensor(d!) v_cache, Tensor slot_mapping, bool packed) -> ()");
  library.def(
      "rope_write_quantized_kv(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor positions, Tensor cos_sin, "
      "Tensor(c!) k_cache, Tensor(d!) v_cache, Tensor(e!) k_scales, Tensor(f!) v_scales, Tensor slot_mapping, "
      "int kind) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) {
  library.impl("rope", TORCH_BOX(&rope));
  library.impl("write_kv", TORCH_BOX(&write_kv));
  library.impl("write_quantized_kv", TORCH_BOX(&write_quantized_kv));
  library.impl("rope_write_kv", TORCH_BOX(&rope_write_kv));
  library.impl("rope_write_quantized_kv", TORCH_BOX(&rope_write_quantized_kv));
}

}  // namespace cpu_ops
