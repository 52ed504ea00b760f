// Norms of bfloat16: as elementwise_kernel.cpp, which takes three times as many instructions.

#include "amx_math.h"
#include "elementwise.h"

namespace cpu_ops {
namespace amx {
namespace {

// The row to be normed: x, or the rounded sum of x and the residual, which goes to `total`.
inline const char* sum_row(const Norm& norm, int64_t row, char* total) {
  const char* x = static_cast<const char*>(norm.x) + row * norm.x_stride * 2;
  if (norm.residual == nullptr) return x;
  const char* residual = static_cast<const char*>(norm.residual) + row * norm.residual_stride * 2;
  for (int64_t i = 0; i < norm.size; i += 32) {
    const __mmask32 mask = mask_of(norm.size - i);
    const Pair a = load(x + i * 2, mask), b = load(residual + i * 2, mask);
    store(total + i * 2, mask, {_mm512_add_ps(a.even, b.even), _mm512_add_ps(a.odd, b.odd)});
  }
  return total;
}

}  // namespace

void rms_norm(const Norm& norm, int64_t first, int64_t last) {
  const char* weight = static_cast<const char*>(norm.weight);
  const __m512 offset = _mm512_set1_ps(norm.weight_offset);
  for (int64_t row = first; row < last; ++row) {
    char* out = static_cast<char*>(norm.out) + row * norm.size * 2;
    const char* x = sum_row(norm, row, static_cast<char*>(norm.total) + row * norm.size * 2);
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int64_t i = 0; i < norm.size; i += 32) {
      const Pair value = load(x + i * 2, mask_of(norm.size - i));
      even = _mm512_fmadd_ps(value.even, value.even, even);
      odd = _mm512_fmadd_ps(value.odd, value.odd, odd);
    }
    const float mean = _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) / static_cast<float>(norm.size);
    const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + norm.eps));
    for (int64_t i = 0; i < norm.size; i += 32) {
      const __mmask32 mask = mask_of(norm.size - i);
      const Pair value = load(x + i * 2, mask), w = load(weight + i * 2, mask);
      Pair normed{_mm512_mul_ps(value.even, scale), _mm512_mul_ps(value.odd, scale)};
      if (norm.weight_offset != 0.0f) {
        normed = {_mm512_mul_ps(normed.even, _mm512_add_ps(w.even, offset)),
                  _mm512_mul_ps(normed.odd, _mm512_add_ps(w.odd, offset))};
      } else {
        normed = rounded(normed);
        normed = {_mm512_mul_ps(normed.even, w.even), _mm512_mul_ps(normed.odd, w.odd)};
      }
      store(out + i * 2, mask, normed);
    }
  }
}

void layer_norm(const Norm& norm, int64_t first, int64_t last) {
  const char *weight = static_cast<const char*>(norm.weight), *bias = static_cast<const char*>(norm.bias);
  const float size = static_cast<float>(norm.size);
  for (int64_t row = first; row < last; ++row) {
    char* out = static_cast<char*>(norm.out) + row * norm.size * 2;
    const char* x = sum_row(norm, row, out);
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int64_t i = 0; i < norm.size; i += 32) {
      const Pair value = load(x + i * 2, mask_of(norm.size - i));
      even = _mm512_add_ps(value.even, even);
      odd = _mm512_add_ps(value.odd, odd);
    }
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_add_ps(even, odd)) / size);
    even = odd = _mm512_setzero_ps();
    for (int64_t i = 0; i < norm.size; i += 32) {
      const __mmask32 mask = mask_of(norm.size - i);
      const Pair value = load(x + i * 2, mask);
      const __m512 a = _mm512_maskz_sub_ps(static_cast<__mmask16>(_pext_u32(mask, 0x55555555)), value.even, mean);
      const __m512 b = _mm512_maskz_sub_ps(static_cast<__mmask16>(_pext_u32(mask, 0xaaaaaaaa)), value.odd, mean);
      even = _mm512_fmadd_ps(a, a, even);
      odd = _mm512_fmadd_ps(b, b, odd);
    }
    const float variance = _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) / size;
    const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(variance + norm.eps));
    for (int64_t i = 0; i < norm.size; i += 32) {
      const __mmask32 mask = mask_of(norm.size - i);
      const Pair value = load(x + i * 2, mask), w = load(weight + i * 2, mask), b = load(bias + i * 2, mask);
      const __m512 c = _mm512_mul_ps(_mm512_sub_ps(value.even, mean), scale);
      const __m512 d = _mm512_mul_ps(_mm512_sub_ps(value.odd, mean), scale);
      store(out + i * 2, mask, {_mm512_fmadd_ps(c, w.even, b.even), _mm512_fmadd_ps(d, w.odd, b.odd)});
    }
  }
}

}  // namespace amx
}  // namespace cpu_ops
