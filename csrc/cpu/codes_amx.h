// Tiles of a weight that is kept as integers (linear.h: GroupedInt), made when rows come to them.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "linear.h"

namespace cpu_ops {
namespace amx {

// 8 outputs' scales or zeros, each twice: of its two inputs.
inline void load_twice(__m512* to, const float* from) {
  const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512 each = _mm512_load_ps(from);
  to[0] = _mm512_permutexvar_ps(low, each);
  to[1] = _mm512_permutexvar_ps(_mm512_add_epi32(low, _mm512_set1_epi32(8)), each);
}

template <int bits, bool zeros> void unpack_tile(const char* codes, const float* scales, char* to) {
  __m512 scale[2], zero[2];
  load_twice(scale, scales);
  if constexpr (zeros) load_twice(zero, scales + kStrip);
  const __m512 signed_4bits = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
  for (int line = 0; line < 16; ++line) {
    const __m128i* at = reinterpret_cast<const __m128i*>(codes + line * 4 * bits);
    __m512 value[2];
    if constexpr (bits == 8) {
      value[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(at)));
      value[1] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(at + 1)));
    } else {  // the look-up takes the lower four bits
      const __m512i pairs = _mm512_cvtepu8_epi32(_mm_load_si128(at));
      value[0] = _mm512_permutexvar_ps(pairs, signed_4bits);
      value[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), signed_4bits);
    }
    for (int i = 0; i < 2; ++i) {
      if constexpr (zeros) value[i] = _mm512_sub_ps(value[i], zero[i]);
      value[i] = _mm512_mul_ps(value[i], scale[i]);
    }
    _mm512_store_si512(to + line * 64, (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]));
  }
}

// Two strips, step by step: a step's tiles to its place among those of the same lowest bits.
class Unpacker {
 public:
  Unpacker(const Product& product, int64_t first, int64_t second, char* const* to, int64_t places)
      : codes_(product.codes), bytes_(codes_.tile_bytes()), left_(codes_.steps), places_(places) {
    const int64_t strips[2] = {first, second};
    for (int i = 0; i < 2; ++i) {
      from_[i] = product.weight + strips[i] * product.strip_bytes();
      scales_[i] = codes_.scales + strips[i] * codes_.groups * group_size();
      to_[i] = to[i];
    }
    run_ = codes_.bits == 8 ? (codes_.zeros ? unpack_tile<8, true> : unpack_tile<8, false>)
                            : (codes_.zeros ? unpack_tile<4, true> : unpack_tile<4, false>);
  }

  void step() {
    for (int i = 0; i < 2; ++i) {
      run_(from_[i], scales_[i], to_[i] + (step_ & places_) * kTileBytes);
      from_[i] += bytes_;
    }
    ++step_;
    if (--left_ > 0) return;
    for (const float*& scales : scales_) scales += group_size();
    left_ = codes_.steps;
  }

 private:
  int64_t group_size() const { return codes_.zeros ? 2 * kStrip : kStrip; }

  const GroupedInt& codes_;
  int64_t bytes_, left_, places_, step_ = 0;
  const char* from_[2];
  const float* scales_[2];
  char* to_[2];
  void (*run_)(const char*, const float*, char*);
};

}  // namespace amx
}  // namespace cpu_ops
