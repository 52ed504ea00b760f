// Keys and values of successive tokens into the packed form (packed.h), 16 or 32 tokens at a time.

#include <immintrin.h>

#include "amx_math.h"
#include "packed.h"

namespace cpu_ops {
namespace amx {
namespace {

void write_key(char* block, int64_t block_size, int64_t slot, const char* key, int64_t D) {
  char* to = block + slot / kPackedKeys * kPackedTile + slot % kPackedKeys * 4;
  for (int64_t d = 0; d < D; d += 32, key += 64, to += block_size / kPackedKeys * kPackedTile)
    for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(to + i * 64, key + i * 4, 4);
}

// 32 numbers of each of 16 keys; zeros for those from `count` on.
void write_keys_tile(char* to, const char* keys, int64_t stride, int64_t count) {
  __m512i rows[kPackedKeys];
  for (int i = 0; i < kPackedKeys; ++i)
    rows[i] = i < count ? _mm512_loadu_si512(keys + i * stride) : _mm512_setzero_si512();
  transpose(rows);
  for (int i = 0; i < kPackedKeys; ++i) _mm512_store_si512(to + i * 64, rows[i]);
}

void write_value(char* block, int64_t slot, const char* value, int64_t D) {
  char* to = block + slot / kPackedValues * (D / 16) * kPackedTile + slot % kPackedValues / 2 * 64 + slot % 2 * 2;
  for (int64_t d = 0; d < D; d += 16, value += 32, to += kPackedTile)
    for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(to + i * 4, value + i * 2, 2);
}

// Pairs of values, one of each of two tokens, which begin at `first` of 32.
inline __m512i paired(__m512i a, __m512i b, int first) {
  const __m512i places = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                          36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  return _mm512_permutex2var_epi16(a, _mm512_add_epi16(places, _mm512_set1_epi16(static_cast<short>(first))), b);
}

}  // namespace

void pack_keys(char* to, const char* keys, int64_t stride, int64_t count, int64_t D) {
  const int64_t groups = (count + kPackedValues - 1) / kPackedValues * (kPackedValues / kPackedKeys);
  for (int64_t d = 0; d < D / 32; ++d)
    for (int64_t g = 0; g < groups; ++g, to += kPackedTile) {
      const int64_t first = g * kPackedKeys;
      write_keys_tile(to, keys + first * stride + d * 64, stride, count - first);
    }
}

void pack_values(char* to, const char* values, int64_t stride, int64_t count, int64_t D) {
  const int64_t groups = (count + kPackedValues - 1) / kPackedValues;
  for (int64_t g = 0; g < groups; ++g, to += D / 16 * kPackedTile)
    for (int64_t p = 0; p < kPackedValues / 2; ++p) {
      const int64_t even = g * kPackedValues + 2 * p;
      for (int64_t d = 0; d < D / 32; ++d) {
        const char* from = values + even * stride + d * 64;
        const __m512i a = even < count ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
        const __m512i b = even + 1 < count ? _mm512_loadu_si512(from + stride) : _mm512_setzero_si512();
        char* tile = to + 2 * d * kPackedTile + p * 64;
        _mm512_store_si512(tile, paired(a, b, 0));
        _mm512_store_si512(tile + kPackedTile, paired(a, b, 16));
      }
    }
}

void write_keys(char* block, int64_t block_size, int64_t slot, const char* keys, int64_t stride, int64_t count,
                int64_t D) {
  for (int64_t done = 0; done < count;) {
    const int64_t at = slot + done;
    const char* key = keys + done * stride;
    if (at % kPackedKeys || count - done < kPackedKeys) {
      write_key(block, block_size, at, key, D);
      ++done;
      continue;
    }
    char* to = block + at / kPackedKeys * kPackedTile;
    for (int64_t d = 0; d < D / 32; ++d, to += block_size / kPackedKeys * kPackedTile)
      write_keys_tile(to, key + d * 64, stride, kPackedKeys);
    done += kPackedKeys;
  }
}

void write_values(char* block, int64_t, int64_t slot, const char* values, int64_t stride, int64_t count, int64_t D) {
  for (int64_t done = 0; done < count;) {
    const int64_t at = slot + done;
    const char* value = values + done * stride;
    if (at % 2 || done + 1 == count) {
      write_value(block, at, value, D);
      ++done;
      continue;
    }
    char* to = block + at / kPackedValues * (D / 16) * kPackedTile + at % kPackedValues / 2 * 64;
    for (int64_t d = 0; d < D / 32; ++d, to += 2 * kPackedTile) {
      const __m512i a = _mm512_loadu_si512(value + d * 64), b = _mm512_loadu_si512(value + stride + d * 64);
      _mm512_store_si512(to, paired(a, b, 0));
      _mm512_store_si512(to + kPackedTile, paired(a, b, 16));
    }
    done += 2;
  }
}

}  // namespace amx
}  // namespace cpu_ops
