// Functions of vectors for processors with AMX, which have AVX512-BF16 as well.
#pragma once

#include <immintrin.h>
#include <stdint.h>

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

// 32 bfloat16 numbers as float32: those at even places, which are the low halves of 32-bit lanes, and those at odd ones.
struct Pair {
  __m512 even, odd;
};

inline Pair widened(__m512i x) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), _mm512_castsi512_ps(_mm512_and_si512(x, high))};
}

inline __m512i narrowed(Pair x) {
  // The conversion puts one after the other; this brings each back to its place.
  const __m512i places = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008,
                                         0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  return _mm512_permutexvar_epi16(places, (__m512i)_mm512_cvtne2ps_pbh(x.odd, x.even));
}

inline Pair rounded(Pair x) { return widened(narrowed(x)); }

// The first `left` of 32 places.
inline __mmask32 mask_of(int64_t left) { return left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1; }

inline Pair load(const char* from, __mmask32 mask) { return widened(_mm512_maskz_loadu_epi16(mask, from)); }
inline void store(char* to, __mmask32 mask, Pair x) { _mm512_mask_storeu_epi16(to, mask, narrowed(x)); }

// 16 rows of 16 32-bit lanes, transposed.
inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Each 128 bits of r[4g + c] now hold column 4 * (which 128 bits) + c of rows 4g to 4g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88), e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(a, d, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
    t[4 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

}  // namespace amx
}  // namespace cpu_ops
