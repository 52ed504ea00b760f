// Storing new keys and values in 8 or 4 bits. Contract: write_quantized_kv in engines/ops/kv_cache.py.
#pragma once

#include "kv_codes.cuh"

namespace cuda_ops {

template <class T> struct CodesWriteParams {
  const T *k, *v;               // [num_tokens, num_kv_heads, head_dim], the last dimension dense
  uint8_t *k_codes, *v_codes;   // [num_blocks, num_kv_heads, block_size, kv_width]
  float *k_scales, *v_scales;   // [num_blocks, num_kv_heads, block_size, kv_numbers]
  const int64_t* slot_mapping;  // [num_tokens]; a slot outside the cache is the padding of a captured batch
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride, num_slots;
  int num_kv_heads, block_size, head_dim;
  Form form;
};

// The larger one; NaN if one of them is.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

constexpr int kWriteWarps = 4;

// Grid: a block a token. Threads: warps that take vectors, keys and values of a head, in turn; a lane has pairs of
// neighbouring numbers. Reads k and v, the second time out of the first-level cache; writes codes and scales.
template <class T> __global__ void __launch_bounds__(kWriteWarps * 32) codes_write_kernel(CodesWriteParams<T> p) {
  const int64_t token = blockIdx.x, slot = p.slot_mapping[token];
  if (slot < 0 || slot >= p.num_slots) return;
  const int64_t block = slot / p.block_size, offset = slot % p.block_size;
  const int lane = threadIdx.x % 32, width = kv_width(p.form, p.head_dim), numbers = kv_numbers(p.form);
  for (int vector = threadIdx.x / 32; vector < 2 * p.num_kv_heads; vector += kWriteWarps) {
    const int head = vector / 2;
    const bool key = vector % 2 == 0;
    const T* x = key ? p.k + token * p.k_token_stride + head * p.k_head_stride
                     : p.v + token * p.v_token_stride + head * p.v_head_stride;
    float low = -INFINITY, high = -INFINITY;  // low: of the numbers' negatives
    for (int i = lane; i < p.head_dim; i += 32) {
      low = larger(low, -to_float(x[i]));
      high = larger(high, to_float(x[i]));
    }
#pragma unroll
    for (int by = 16; by; by /= 2) {
      low = larger(low, __shfl_xor_sync(~0u, low, by));
      high = larger(high, __shfl_xor_sync(~0u, high, by));
    }
    const KvScale scale = kv_scale(p.form, -low, high);
    const int64_t to = (block * p.num_kv_heads + head) * p.block_size + offset;
    uint8_t* codes = (key ? p.k_codes : p.v_codes) + to * width;
    for (int i = lane * 2; i < p.head_dim; i += 64) {
      const bool two = i + 1 < p.head_dim;
      const uint8_t first = kv_code(p.form, to_float(x[i]), scale);
      const uint8_t second = two ? kv_code(p.form, to_float(x[i + 1]), scale) : 0;
      if (p.form == Form::int4) {
        codes[i / 2] = static_cast<uint8_t>(first | second << 4);
        continue;
      }
      codes[i] = first;
      if (two) codes[i + 1] = second;
    }
    if (lane < numbers) (key ? p.k_scales : p.v_scales)[to * numbers + lane] = lane ? scale.offset : scale.scale;
  }
}

}  // namespace cuda_ops
