// Norms of bfloat16: as elementwise_kernel.cpp, which takes three times as many instructions.

#include "amx_math.h"
#include "elementwise.h"

namespace cpu_ops {
namespace amx {
namespace {

// 32 values of a row, or as many as are left: zeros after those.
struct Values {
  __m512 low, high;
};

inline __mmask32 mask_of(int64_t left) { return left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1; }

inline Values load(const char* from, __mmask32 mask) {
  const __m512i x = _mm512_maskz_loadu_epi16(mask, from);
  return {low(x), high(x)};
}

inline __m512i narrow(Values x) { return (__m512i)_mm512_cvtne2ps_pbh(x.high, x.low); }
inline void store(char* to, __mmask32 mask, __m512i x) { _mm512_mask_storeu_epi16(to, mask, x); }

// The row to be normed: x, or the rounded sum of x and the residual, which goes to `total`.
inline const char* sum_row(const Norm& norm, int64_t row, char* total) {
  const char* x = static_cast<const char*>(norm.x) + row * norm.x_stride * 2;
  if (norm.residual == nullptr) return x;
  const char* residual = static_cast<const char*>(norm.residual) + row * norm.residual_stride * 2;
  for (int64_t i = 0; i < norm.size; i += 32) {
    const __mmask32 mask = mask_of(norm.size - i);
    const Values a = load(x + i * 2, mask), b = load(residual + i * 2, mask);
    store(total + i * 2, mask, narrow({_mm512_add_ps(a.low, b.low), _mm512_add_ps(a.high, b.high)}));
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
      const Values value = load(x + i * 2, mask_of(norm.size - i));
      even = _mm512_fmadd_ps(value.low, value.low, even);
      odd = _mm512_fmadd_ps(value.high, value.high, odd);
    }
    const float mean = _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) / static_cast<float>(norm.size);
    const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + norm.eps));
    for (int64_t i = 0; i < norm.size; i += 32) {
      const __mmask32 mask = mask_of(norm.size - i);
      const Values value = load(x + i * 2, mask), w = load(weight + i * 2, mask);
      Values normed{_mm512_mul_ps(value.low, scale), _mm512_mul_ps(value.high, scale)};
      if (norm.weight_offset != 0.0f) {
        normed = {_mm512_mul_ps(normed.low, _mm512_add_ps(w.low, offset)),
                  _mm512_mul_ps(normed.high, _mm512_add_ps(w.high, offset))};
      } else {
        const __m512i once = narrow(normed);
        normed = {_mm512_mul_ps(low(once), w.low), _mm512_mul_ps(high(once), w.high)};
      }
      store(out + i * 2, mask, narrow(normed));
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
      const Values value = load(x + i * 2, mask_of(norm.size - i));
      even = _mm512_add_ps(value.low, even);
      odd = _mm512_add_ps(value.high, odd);
    }
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_add_ps(even, odd)) / size);
    even = odd = _mm512_setzero_ps();
    for (int64_t i = 0; i < norm.size; i += 32) {
      const __mmask32 mask = mask_of(norm.size - i);
      const Values value = load(x + i * 2, mask);
      const __m512 a = _mm512_maskz_sub_ps(static_cast<__mmask16>(mask), value.low, mean);
      const __m512 b = _mm512_maskz_sub_ps(static_cast<__mmask16>(mask >> 16), value.high, mean);
      even = _mm512_fmadd_ps(a, a, even);
      odd = _mm512_fmadd_ps(b, b, odd);
    }
    const float variance = _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) / size;
    const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(variance + norm.eps));
    for (int64_t i = 0; i < norm.size; i += 32) {
      const __mmask32 mask = mask_of(norm.size - i);
      const Values value = load(x + i * 2, mask), w = load(weight + i * 2, mask), b = load(bias + i * 2, mask);
      const __m512 c = _mm512_mul_ps(_mm512_sub_ps(value.low, mean), scale);
      const __m512 d = _mm512_mul_ps(_mm512_sub_ps(value.high, mean), scale);
      store(out + i * 2, mask, narrow({_mm512_fmadd_ps(c, w.low, b.low), _mm512_fmadd_ps(d, w.high, b.high)}));
    }
  }
}

}  // namespace amx
}  // namespace cpu_ops
