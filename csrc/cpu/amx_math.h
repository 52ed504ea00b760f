// Functions of vectors for processors with AMX, which have AVX512-BF16 as well.
#pragma once

#include <immintrin.h>

namespace cpu_ops {
namespace amx {

// 2^x within 3e-6; exactly 0 below -126, so for -inf as well; NaN for NaN. Cephes' polynomial, less its last term.
inline __m512 exp2(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.339887440266574e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.618437357674640e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550332471162809e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402264791363012e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931472028550421e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), p, n);
}

inline float exp2(float x) { return _mm512_cvtss_f32(exp2(_mm512_set1_ps(x))); }

// bfloat16 numbers as float32.
inline __m512 widened(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }
// The first 16 of 32, and the others.
inline __m512 low(__m512i x) { return widened(_mm512_castsi512_si256(x)); }
inline __m512 high(__m512i x) { return widened(_mm512_extracti64x4_epi64(x, 1)); }
inline __m512 rounded(__m512 x) { return widened((__m256i)_mm512_cvtneps_pbh(x)); }

}  // namespace amx
}  // namespace cpu_ops
