// Keys and values of successive tokens into the packed form (packed.h), 16 or 32 tokens at a time.

#include <immintrin.h>

#include "packed.h"

namespace cpu_ops {
namespace amx {
namespace {

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

}  // namespace

void pack_keys(char* to, const char* keys, int64_t stride, int64_t count, int64_t D) {
  const int64_t groups = (count + kPackedValues - 1) / kPackedValues * (kPackedValues / kPackedKeys);
  for (int64_t d = 0; d < D / 32; ++d)
    for (int64_t g = 0; g < groups; ++g, to += kPackedTile) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t key = g * kPackedKeys + i;
        rows[i] = key < count ? _mm512_loadu_si512(keys + key * stride + d * 64) : _mm512_setzero_si512();
      }
      transpose(rows);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, rows[i]);
    }
}

void pack_values(char* to, const char* values, int64_t stride, int64_t count, int64_t D) {
  alignas(64) uint16_t low[32], high[32];
  for (int i = 0; i < 16; ++i) {
    low[2 * i] = static_cast<uint16_t>(i);
    low[2 * i + 1] = static_cast<uint16_t>(32 + i);
    high[2 * i] = static_cast<uint16_t>(16 + i);
    high[2 * i + 1] = static_cast<uint16_t>(48 + i);
  }
  const __m512i first = _mm512_load_si512(low), second = _mm512_load_si512(high);
  const int64_t groups = (count + kPackedValues - 1) / kPackedValues;
  for (int64_t g = 0; g < groups; ++g, to += D / 16 * kPackedTile)
    for (int64_t p = 0; p < kPackedValues / 2; ++p) {
      const int64_t even = g * kPackedValues + 2 * p;
      for (int64_t d = 0; d < D / 32; ++d) {
        const char* from = values + even * stride + d * 64;
        const __m512i a = even < count ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
        const __m512i b = even + 1 < count ? _mm512_loadu_si512(from + stride) : _mm512_setzero_si512();
        char* tile = to + 2 * d * kPackedTile + p * 64;
        _mm512_store_si512(tile, _mm512_permutex2var_epi16(a, first, b));
        _mm512_store_si512(tile + kPackedTile, _mm512_permutex2var_epi16(a, second, b));
      }
    }
}

}  // namespace amx
}  // namespace cpu_ops
