// Attention over a cache in 8 or 4 bits on the matrix unit, whose products of integers take the codes as they are.
//
// Queries are rounded to 16 bits of their row's largest number, and so are weights times the scales of the values they
// weigh, of the largest in a tile of keys: each in two limbs of 8 bits, whose sums are exact. Then
//   key . query = scale * sum(code * q) + offset * sum(q)
//   sum of weighted values = sum(weight * scale * code) + sum(weight * offset)
// so no key or value is rounded, nor a weight to fewer bits than bfloat16 has. A row's bits do not depend on the rows
// beside it, and hidden keys weigh exactly zero.
//
// A matrix tile that was just stored cannot be loaded at once: so values are brought into form between the products of
// keys and what is made of them, and the next keys between the products of values and theirs. Memory is asked for a tile
// of keys and values row by row while the one before it is brought into form.

#include <immintrin.h>

#include "amx.h"
#include "attention_amx.h"

namespace cpu_ops {
namespace amx {
namespace {

constexpr int kChunk = 64;                         // codes of a row of a tile
constexpr int kTileBytes = 1024;
constexpr float kSmallest = 0x1p-110f;             // weights below it are zero: their inverse must be finite
constexpr int kSteps = 65535, kSignedSteps = 32767;

// A tile of keys and of values in the form that products take.
struct Staged {
  int count;             // keys that there are
  float* key_scales;     // [kTile], zero where there are no keys, and so the next three
  float* key_offsets;
  float* value_scales;
  float* value_offsets;
  char* keys;            // [P / kChunk][kGroups] tiles: 4 of d, 16 keys, 16 times
  char* values;          // [P / kChunk][4] tiles: 4 keys, 16 of d, 16 times
};

// What a thread works on, laid out in its scratch. P: head_dim in whole chunks.
struct Scratch : Softmax {
  float* out;               // [kRows][P] sums of weighted values, in the order of stage_values
  float* offsets;           // [kRows][16] sums of weights times offsets, a lane each
  float* q_scale;           // [kRows] of a step of q
  float* q_sum;             // [kRows]
  float* step;              // [kRows] of this tile's weights
  int32_t* key_products;    // [kGroups][2 limbs][16][16]
  int32_t* value_products;  // [P / 16][2 limbs][16][16]
  char* q_high;             // [kRows][P] signed
  char* q_low;              // [kRows][P]
  char* high;               // [kSide][kTile] of weights
  char* low;                // the same
  Staged tile;

  Scratch(float* at, int P) {
    const auto take = [&at](int64_t floats) {
      float* const taken = at;
      at += floats;
      return taken;
    };
    const auto bytes = [&take](int64_t count) { return reinterpret_cast<char*>(take(count / 4)); };
    out = take(kRows * P);
    scores = take(kRows * kTile);
    sums = take(kRows * 16);
    offsets = take(kRows * 16);
    maximum = take(kRows);
    base = take(kRows);
    factor = take(kRows);
    q_scale = take(kRows);
    q_sum = take(kRows);
    step = take(kRows);
    key_products = reinterpret_cast<int32_t*>(bytes(kGroups * 2 * kTileBytes));
    value_products = reinterpret_cast<int32_t*>(bytes(P / kSide * 2 * kTileBytes));
    q_high = bytes(kRows * P);
    q_low = bytes(kRows * P);
    high = bytes(kSide * kTile);
    low = bytes(kSide * kTile);
    tile = {0, take(kTile), take(kTile), take(kTile), take(kTile), bytes(kTile * P), bytes(kTile * P)};
  }
};

// Where the cache holds a tile of keys and of values.
struct Located {
  int64_t first;
  int count;
  const char* k[kTile];
  const char* v[kTile];
};

// Calls function(t, n, block, slot) for the runs of a tile's keys that lie one after the other: n from the t-th on.
template <class Function> inline void for_runs(const Work& work, int64_t first, int count, const Function& function) {
  int64_t key = first;
  for (int t = 0, n; t < count; t += n, key += n) {
    const int64_t slot = key % work.block_size, rest = work.block_size - slot;
    n = rest < count - t ? static_cast<int>(rest) : count - t;
    function(t, n, static_cast<int64_t>(work.block_table[key / work.block_size]), slot);
  }
}

inline void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0); }

// Where a tile is; asks for its scales.
void locate(Located& at, const Work& work, int64_t first) {
  const int64_t left = work.end - first;
  at.first = first;
  at.count = left < kTile ? static_cast<int>(left > 0 ? left : 0) : kTile;
  for_runs(work, first, at.count, [&](int t, int n, int64_t block, int64_t slot) {
    const char* k = work.k + block * work.k_block_stride + slot * work.k_slot_stride;
    const char* v = work.v + block * work.v_block_stride + slot * work.v_slot_stride;
    for (int i = 0; i < n; ++i, k += work.k_slot_stride, v += work.v_slot_stride) at.k[t + i] = k, at.v[t + i] = v;
    const int64_t scales = block * work.scales_block_stride + slot * work.scales_slot_stride;
    for (int i = 0; i < 2 * n; i += 16) {
      prefetch(work.k_scales + scales + i);
      prefetch(work.v_scales + scales + i);
    }
  });
}

// Pairs of scale and offset, one after the other, to two arrays.
void split(const float* pairs, float* scales, float* offsets) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int t = 0; t < kTile; t += 16) {
    const __m512 a = _mm512_load_ps(pairs + 2 * t), b = _mm512_load_ps(pairs + 2 * t + 16);
    _mm512_store_ps(scales + t, _mm512_permutex2var_ps(a, even, b));
    _mm512_store_ps(offsets + t, _mm512_permutex2var_ps(a, odd, b));
  }
}

inline void copy(float* to, const float* from, int count) {
  for (int i = 0; i < count; i += 16) {
    const __mmask16 mask = count - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (count - i)) - 1);
    _mm512_mask_storeu_ps(to + i, mask, _mm512_maskz_loadu_ps(mask, from + i));
  }
}

void stage_scales(Staged& to, const Located& at, const Work& work) {
  alignas(64) float keys[2 * kTile], values[2 * kTile];
  to.count = at.count;
  if (at.count < kTile) {
    __builtin_memset(keys, 0, sizeof keys);
    __builtin_memset(values, 0, sizeof values);
  }
  for_runs(work, at.first, at.count, [&](int t, int n, int64_t block, int64_t slot) {
    const int64_t scales = block * work.scales_block_stride + slot * work.scales_slot_stride;
    copy(keys + 2 * t, work.k_scales + scales, 2 * n);
    copy(values + 2 * t, work.v_scales + scales, 2 * n);
  });
  split(keys, to.key_scales, to.key_offsets);
  split(values, to.value_scales, to.value_offsets);
}

// The codes of a row from d on, `left` of them, a byte each; zeros after them.
template <Codes codes> inline __m512i load_codes(const char* row, int d, int left) {
  if constexpr (codes == Codes::int8) {
    if (left >= kChunk) return _mm512_loadu_si512(row + d);
    return _mm512_maskz_loadu_epi8((__mmask64{1} << left) - 1, row + d);
  } else {
    const __m256i pairs = left >= kChunk
                              ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + d / 2))
                              : _mm256_maskz_loadu_epi8((__mmask32{1} << (left + 1) / 2) - 1, row + d / 2);
    const __m512i wide = _mm512_cvtepu8_epi16(pairs);
    return _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi16(0x0f0f));
  }
}

// Asks for the codes of a row from d on.
template <Codes codes> inline void prefetch_codes(const char* row, int d) {
  if (codes == Codes::int8 || d % (2 * kChunk) == 0) prefetch(row + (codes == Codes::int8 ? d : d / 2));
}

template <Codes codes> void stage_keys(Staged& staged, const Located& at, const Located& after, int D) {
  char* to = staged.keys;
  for (int d = 0; d < D; d += kChunk)
    for (int g = 0; g < kGroups; ++g, to += kTileBytes) {
      if (g * kSide >= at.count) continue;
      __m512i rows[kSide];
      for (int i = 0; i < kSide; ++i) {
        const int t = g * kSide + i;
        rows[i] = t < at.count ? load_codes<codes>(at.k[t], d, D - d) : _mm512_setzero_si512();
        if (t < after.count) prefetch_codes<codes>(after.k[t], d);
      }
      transpose(rows);
      for (int i = 0; i < kSide; ++i) _mm512_store_si512(to + i * 64, rows[i]);
    }
}

// Of four keys a row of a tile each: the p-th is what store_limbs has at bytes 4 p to 4 p + 3. Tile m of a chunk has
// the numbers 16 i + 4 m to 16 i + 4 m + 3 of it at columns 4 i to 4 i + 3, as the instructions leave them.
template <Codes codes> void stage_values(Staged& staged, const Located& at, const Located& after, int D) {
  if (at.count == 0) return;
  for (int p = 0; p < kSide; ++p) {
    const int first = 4 * (p % 4 * 4 + p / 4);
    char* to = staged.values + p * 64;
    for (int d = 0; d < D; d += kChunk, to += 4 * kTileBytes) {
      __m512i row[4];
      for (int i = 0; i < 4; ++i) {
        const int t = first + i;
        row[i] = t < at.count ? load_codes<codes>(at.v[t], d, D - d) : _mm512_setzero_si512();
        if (t < after.count) prefetch_codes<codes>(after.v[t], d);
      }
      const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpackhi_epi8(row[0], row[1]);
      const __m512i c = _mm512_unpacklo_epi8(row[2], row[3]), e = _mm512_unpackhi_epi8(row[2], row[3]);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(a, c));
      _mm512_store_si512(to + kTileBytes, _mm512_unpackhi_epi16(a, c));
      _mm512_store_si512(to + 2 * kTileBytes, _mm512_unpacklo_epi16(b, e));
      _mm512_store_si512(to + 3 * kTileBytes, _mm512_unpackhi_epi16(b, e));
    }
  }
}

inline __m512 load_row(const void* row, Type type, int d, int left) {
  const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, static_cast<const char*>(row) + d * 2);
  if (type == Type::f16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// q's row r in two limbs; its step is NaN where q has numbers that are not finite.
void round_query(const Scratch& s, const Work& work, int r, int D, int P) {
  __m512 most = _mm512_setzero_ps(), sum = most, nothing = most;
  for (int d = 0; d < D; d += 16) {
    const __m512 x = load_row(work.q[r], work.type, d, D - d);
    most = _mm512_max_ps(most, _mm512_abs_ps(x));
    sum = _mm512_add_ps(sum, x);
    nothing = _mm512_fmadd_ps(x, _mm512_setzero_ps(), nothing);
  }
  const float largest = _mm512_reduce_max_ps(most);
  const bool some = largest > kSmallest;
  const __m512 inverse = _mm512_set1_ps(some ? kSignedSteps / largest : 0.0f);
  s.q_scale[r] = (some ? largest / kSignedSteps : 0.0f) + _mm512_reduce_add_ps(nothing);
  s.q_sum[r] = _mm512_reduce_add_ps(sum);
  for (int d = 0; d < P; d += 16) {
    const __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(load_row(work.q[r], work.type, d, D > d ? D - d : 0), inverse));
    _mm_store_si128(reinterpret_cast<__m128i*>(s.q_high + r * P + d), _mm512_cvtepi32_epi8(_mm512_srai_epi32(x, 8)));
    _mm_store_si128(reinterpret_cast<__m128i*>(s.q_low + r * P + d), _mm512_cvtepi32_epi8(x));
  }
}

// A row's state: 16 lanes of its denominator, 16 of its offsets, its maximum, padding, then its sums.
void start(const Scratch& s, const Work& work, int D, int P) {
  for (int r = 0; r < (work.num_rows + kSide - 1) / kSide * kSide; ++r) {
    const float* state = r < work.num_rows && !work.store_state ? work.state[r] : nullptr;
    s.maximum[r] = state ? state[32] : kNone;
    _mm512_store_ps(s.sums + r * 16, state ? _mm512_loadu_ps(state) : _mm512_setzero_ps());
    _mm512_store_ps(s.offsets + r * 16, state ? _mm512_loadu_ps(state + 16) : _mm512_setzero_ps());
    if (state) __builtin_memcpy(s.out + r * P, state + kStateHeader, P * sizeof(float));
    else __builtin_memset(s.out + r * P, 0, P * sizeof(float));
    if (r < work.num_rows) round_query(s, work, r, D, P);
  }
}

// Products of the rows' limbs from r on with the codes of the keys.
void multiply_keys(const Scratch& s, const Staged& tile, int r, int P) {
  for (int g = 0; g * kSide < tile.count; g += 2) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int d = 0; d < P; d += kChunk) {
      const char* keys = tile.keys + (d / kChunk * kGroups + g) * kTileBytes;
      if (g == 0 || P > kChunk) {
        _tile_loadd(4, s.q_high + r * P + d, P);
        _tile_loadd(5, s.q_low + r * P + d, P);
      }
      // Of the last group but one, the next one's keys may not be there: what comes of them is hidden.
      _tile_loadd(6, keys, 64);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbuud(1, 5, 6);
      _tile_loadd(7, keys + kTileBytes, 64);
      _tile_dpbsud(2, 4, 7);
      _tile_dpbuud(3, 5, 7);
    }
    int32_t* to = s.key_products + g * 512;
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 256, 64);
    _tile_stored(2, to + 512, 64);
    _tile_stored(3, to + 768, 64);
  }
}

// From products of the rows from r on to their scores.
void score(const Scratch& s, const Staged& tile, const Work& work, int r) {
  const int rows = rows_from(work, r);
  for (int g = 0; g * kSide < tile.count; ++g) {
    const int32_t* products = s.key_products + g * 512;
    const __m512 scales = _mm512_load_ps(tile.key_scales + g * kSide);
    const __m512 offsets = _mm512_load_ps(tile.key_offsets + g * kSide);
    for (int i = 0; i < rows; ++i) {
      const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(products + i * 16));
      const __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(products + 256 + i * 16));
      const __m512 sum = _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), low);
      const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(s.q_scale[r + i]));
      const __m512 offset = _mm512_mul_ps(offsets, _mm512_set1_ps(s.q_sum[r + i]));
      _mm512_store_ps(s.scores + (r + i) * kTile + g * kSide, _mm512_fmadd_ps(sum, scale, offset));
    }
  }
}

// 64 numbers of 0 to kSteps as bytes of their high and low limbs, the four of keys 16 j + 4 i on at 4 (4 i + j).
inline void store_limbs(const __m512i* x, char* high, char* low) {
  const __m512i a = _mm512_packus_epi32(x[0], x[1]), b = _mm512_packus_epi32(x[2], x[3]);
  const __m512i byte = _mm512_set1_epi16(255);
  _mm512_store_si512(high, _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
  _mm512_store_si512(low, _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte)));
}

// Scores become weights times the values' scales; the sums of weights, and of weights times offsets, grow by them.
void exponentiate(const Scratch& s, const Staged& tile, const Work& work, int first, const uint64_t* seen,
                  __m512* most) {
  const __m512 factor_to_log2 = to_log2(work);
  for (int r = first; r < first + rows_from(work, first); ++r) {
    float* x = s.scores + r * kTile;
    const __m512 base = _mm512_set1_ps(s.base[r]), factor = _mm512_set1_ps(s.factor[r]);
    __m512 weight[kGroups], offset = _mm512_setzero_ps(), highest = offset;
    for (int g = 0; g < kGroups; ++g) {
      weight[g] = exp2(_mm512_fmsub_ps(_mm512_load_ps(x + g * kSide), factor_to_log2, base));
      if (seen) weight[g] = _mm512_maskz_mov_ps(part(seen[r - first], g), weight[g]);
      offset = _mm512_fmadd_ps(weight[g], _mm512_load_ps(tile.value_offsets + g * kSide), offset);
      const __m512 scaled = _mm512_mul_ps(weight[g], _mm512_load_ps(tile.value_scales + g * kSide));
      _mm512_store_ps(x + g * kSide, scaled);
      highest = _mm512_max_ps(highest, scaled);
    }
    most[r - first] = highest;
    const __m512 added = _mm512_add_ps(_mm512_add_ps(weight[0], weight[1]), _mm512_add_ps(weight[2], weight[3]));
    float *sums = s.sums + r * 16, *offsets = s.offsets + r * 16;
    _mm512_store_ps(sums, _mm512_fmadd_ps(_mm512_load_ps(sums), factor, added));
    _mm512_store_ps(offsets, _mm512_fmadd_ps(_mm512_load_ps(offsets), factor, offset));
  }
}

// To 16 bits of the largest in the tile.
void round_weights(const Scratch& s, int first, int rows, __m512* most) {
  store_highest(s.step + first, most, rows);
  for (int r = first; r < first + rows; ++r) {
    const float highest = s.step[r];
    const bool some = highest > kSmallest;
    const __m512 inverse = _mm512_set1_ps(some ? kSteps / highest : 0.0f);
    s.step[r] = some ? highest / kSteps : 0.0f;
    __m512i x[kGroups];
    for (int g = 0; g < kGroups; ++g)
      x[g] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(s.scores + r * kTile + g * kSide), inverse));
    store_limbs(x, s.high + (r - first) * kTile, s.low + (r - first) * kTile);
  }
}

// Products of 16 rows' weights with the codes of the values.
void multiply_values(const Scratch& s, const Staged& tile, int P) {
  _tile_loadd(4, s.high, kTile);
  _tile_loadd(5, s.low, kTile);
  for (int d = 0; d < P; d += 32) {
    const char* values = tile.values + d / 16 * kTileBytes;
    int32_t* to = s.value_products + d / 16 * 512;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(6, values, 64);
    _tile_dpbuud(0, 4, 6);
    _tile_dpbuud(1, 5, 6);
    _tile_loadd(7, values + kTileBytes, 64);
    _tile_dpbuud(2, 4, 7);
    _tile_dpbuud(3, 5, 7);
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 256, 64);
    _tile_stored(2, to + 512, 64);
    _tile_stored(3, to + 768, 64);
  }
}

// out = out * factor + products for the rows from r on.
void add_values(const Scratch& s, const Work& work, int r, int P) {
  for (int i = 0; i < rows_from(work, r); ++i) {
    const __m512 factor = _mm512_set1_ps(s.factor[r + i]), step = _mm512_set1_ps(s.step[r + i]);
    for (int d = 0; d < P; d += 16) {
      const int32_t* products = s.value_products + d / 16 * 512 + i * 16;
      // At most 64 * 255 * 65535, which 32 bits hold.
      const __m512i sum =
          _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(products), 8), _mm512_load_si512(products + 256));
      float* to = s.out + (r + i) * P + d;
      const __m512 added = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), step);
      _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_load_ps(to), factor, added));
    }
  }
}

// A chunk of sums in the order of head_dim: see stage_values.
inline void ordered(const float* from, __m512* x) {
  const __m512 a = _mm512_load_ps(from), b = _mm512_load_ps(from + 16);
  const __m512 c = _mm512_load_ps(from + 32), d = _mm512_load_ps(from + 48);
  const __m512 low = _mm512_shuffle_f32x4(a, b, 0x44), high = _mm512_shuffle_f32x4(a, b, 0xee);
  const __m512 low2 = _mm512_shuffle_f32x4(c, d, 0x44), high2 = _mm512_shuffle_f32x4(c, d, 0xee);
  x[0] = _mm512_shuffle_f32x4(low, low2, 0x88);
  x[1] = _mm512_shuffle_f32x4(low, low2, 0xdd);
  x[2] = _mm512_shuffle_f32x4(high, high2, 0x88);
  x[3] = _mm512_shuffle_f32x4(high, high2, 0xdd);
}

inline void store_row(void* row, Type type, int d, int left, __m512 x) {
  const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
  const __m256i halves = type == Type::f16 ? _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                                           : (__m256i)_mm512_cvtneps_pbh(x);
  _mm256_mask_storeu_epi16(static_cast<char*>(row) + d * 2, mask, halves);
}

void finish(const Scratch& s, const Work& work, int D, int P) {
  for (int r = 0; r < work.num_rows; ++r) {
    const float* out = s.out + r * P;
    const __m512 sums = _mm512_load_ps(s.sums + r * 16), offsets = _mm512_load_ps(s.offsets + r * 16);
    if (work.store_state) {
      _mm512_storeu_ps(work.state[r], sums);
      _mm512_storeu_ps(work.state[r] + 16, offsets);
      work.state[r][32] = s.maximum[r];
      __builtin_memcpy(work.state[r] + kStateHeader, out, P * sizeof(float));
      continue;
    }
    const float sum = _mm512_reduce_add_ps(sums);
    float scale = 1.0f / sum;
    if (work.has_sinks) {
      const float sink = work.sink[r] * kLog2e, most = sink > s.maximum[r] ? sink : s.maximum[r];
      const float own = exp2(s.maximum[r] - most);
      scale = own / (sum * own + exp2(sink - most));
    }
    const __m512 offset = _mm512_set1_ps(_mm512_reduce_add_ps(offsets)), scales = _mm512_set1_ps(scale);
    for (int d = 0; d < D; d += kChunk) {
      __m512 x[4];
      ordered(out + d, x);
      for (int i = 0; i < 4 && d + i * 16 < D; ++i)
        store_row(work.out[r], work.type, d + i * 16, D - d - i * 16, _mm512_mul_ps(_mm512_add_ps(x[i], offset), scales));
    }
  }
}

template <Codes codes> void attend_item(const Work& work, float* scratch) {
  const int D = work.head_dim, P = (D + kChunk - 1) / kChunk * kChunk;
  Scratch s(scratch, P);
  const int64_t lowest = lowest_position(work);
  Located located[2];
  start(s, work, D, P);
  locate(located[0], work, work.begin);
  int added = -1;  // rows from here on have products that their sums lack
  for (int64_t first = work.begin, i = 0; first < work.end; first += kTile, ++i) {
    const Located& at = located[i % 2];
    Located& after = located[(i + 1) % 2];
    locate(after, work, first + kTile);
    stage_scales(s.tile, at, work);
    stage_keys<codes>(s.tile, at, after, D);
    for (int r = 0; r < work.num_rows; r += kSide) {
      multiply_keys(s, s.tile, r, P);
      if (added >= 0) add_values(s, work, added, P);
      if (r == 0) stage_values<codes>(s.tile, at, after, D);
      uint64_t masks[kSide];
      __m512 most[kSide];
      const uint64_t* seen = masks_of<kGroups>(work, r, first, at.count, lowest, masks);
      score(s, s.tile, work, r);
      raise_maxima<kGroups>(s, work, r, seen, 0.0f);
      exponentiate(s, s.tile, work, r, seen, most);
      round_weights(s, r, rows_from(work, r), most);
      multiply_values(s, s.tile, P);
      added = r;
    }
  }
  if (added >= 0) add_values(s, work, added, P);
  finish(s, work, D, P);
}

}  // namespace

void attend_codes(const Work* works, int count, const Work*, int, float* scratch) {
  for (const Work* work = works; work < works + count; ++work) {
    TileConfig config(work->num_rows < kSide ? work->num_rows : kSide);
    config.rows[5] = config.rows[4];
    const Tiles tiles(config);
    if (work->codes == Codes::int8) attend_item<Codes::int8>(*work, scratch);
    else attend_item<Codes::int4>(*work, scratch);
  }
}

}  // namespace amx
}  // namespace cpu_ops
