// Activations of vectors of float32, for kernels of processors with AMX.
#pragma once

#include "activation.h"
#include "amx_math.h"

namespace cpu_ops {
namespace amx {

inline __m512 all(float x) { return _mm512_set1_ps(x); }

// x / (1 + 2^power), the quotient by a reciprocal of 14 bits and one step of Newton's method: within 1e-6.
inline __m512 gate(__m512 x, __m512 power) {
  // Bounded, so that the sum is finite: beyond that the quotient is as good as zero. Operands in this order keep NaN.
  const __m512 sum = _mm512_add_ps(exp2(_mm512_min_ps(all(126.0f), power)), all(1.0f));
  const __m512 guess = _mm512_rcp14_ps(sum), none = all(-__builtin_inff());
  const __m512 result = _mm512_mul_ps(x, _mm512_mul_ps(guess, _mm512_fnmadd_ps(sum, guess, all(2.0f))));
  return _mm512_mask_mov_ps(result, _mm512_cmp_ps_mask(x, none, _CMP_EQ_OQ), all(__builtin_nanf("")));
}

constexpr float kLog2e = 1.44269504088896341f;

inline __m512 erf(__m512 x) {
  const __m512 z = _mm512_max_ps(all(-kErfBound), _mm512_min_ps(all(kErfBound), x)), z2 = _mm512_mul_ps(z, z);
  __m512 p = all(kErfP[0]), q = all(kErfQ[0]);
  for (int i = 1; i < 7; ++i) p = _mm512_fmadd_ps(p, z2, all(kErfP[i]));
  for (int i = 1; i < 5; ++i) q = _mm512_fmadd_ps(q, z2, all(kErfQ[i]));
  const __m512 guess = _mm512_rcp14_ps(q);
  return _mm512_mul_ps(_mm512_mul_ps(z, p), _mm512_mul_ps(guess, _mm512_fnmadd_ps(q, guess, all(2.0f))));
}

template <Activation kind> inline __m512 activated(__m512 x) {
  if constexpr (kind == Activation::silu) return gate(x, _mm512_mul_ps(x, all(-kLog2e)));
  else if constexpr (kind == Activation::gelu) {
    const __m512 half = _mm512_mul_ps(x, all(0.5f));
    return _mm512_fmadd_ps(half, erf(_mm512_mul_ps(x, all(kSqrtHalf))), half);
  } else if constexpr (kind == Activation::gelu_tanh) {  // (1 + tanh(u)) / 2 is the logistic function of 2u
    const __m512 cubic = _mm512_mul_ps(all(kGeluCubic), _mm512_mul_ps(x, x));
    return gate(x, _mm512_mul_ps(all(-2.0f * kSqrt2OverPi * kLog2e), _mm512_fmadd_ps(cubic, x, x)));
  } else return _mm512_max_ps(_mm512_setzero_ps(), x);  // operands in this order keep NaN
}

inline __m512 swiglu_oai(__m512 x, __m512 up) {
  const __m512 most = all(kOaiLimit), g = _mm512_min_ps(most, x);
  const __m512 u = _mm512_max_ps(all(-kOaiLimit), _mm512_min_ps(most, up));
  return _mm512_mul_ps(gate(g, _mm512_mul_ps(g, all(-kOaiAlpha * kLog2e))), _mm512_add_ps(u, all(1.0f)));
}

inline __m512 activation(Activation kind, __m512 x) {
  switch (kind) {
    case Activation::silu: return activated<Activation::silu>(x);
    case Activation::gelu: return activated<Activation::gelu>(x);
    case Activation::gelu_tanh: return activated<Activation::gelu_tanh>(x);
    default: return activated<Activation::relu>(x);
  }
}

inline __m512 rounded(__m512 x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

// act(x) * up, where the factor of act is rounded to bfloat16 as the op of two steps rounds it.
inline __m512 gated_activation(Activation kind, __m512 x, __m512 up) {
  if (kind == Activation::swiglu_oai) return swiglu_oai(x, up);
  return _mm512_mul_ps(rounded(activation(kind, x)), up);
}

}  // namespace amx
}  // namespace cpu_ops
