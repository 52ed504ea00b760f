// Keys and values of successive tokens into the packed form (packed.h), 16 or 32 tokens at a time.

#include <immintrin.h>

#include "amx_math.h"
#include "packed.h"

namespace cpu_ops {
namespace amx {

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
