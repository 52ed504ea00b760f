// The softmax of 16 rows on vectors, for the kernels of attention on the matrix unit. Each kernel file includes it once.
//
// Scores are kept in units of log2, so that e^x is a power of two (arXiv 2307.08691, section 3.1).
#pragma once

#include <immintrin.h>

#include "amx.h"
#include "amx_math.h"
#include "attention.h"

namespace cpu_ops {
namespace amx {
namespace {

constexpr int kGroups = kTile / kSide;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kNone = -__builtin_inff();

// Rows' running softmax.
struct Softmax {
  float* scores;   // [kRows][kTile]
  float* sums;     // [kRows][16] running denominators, a lane each
  float* maximum;  // [kRows]
  float* base;     // [kRows] what this tile's scores are reduced by
  float* factor;   // [kRows] of what was summed before
};

// x as softcap * tanh(x / softcap)
inline __m512 capped(__m512 x, float softcap) {
  const __m512 bound = _mm512_set1_ps(10.0f), y = _mm512_div_ps(x, _mm512_set1_ps(softcap));
  // Operands in this order keep NaN.
  const __m512 inside = _mm512_min_ps(bound, _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), bound), y));
  const __m512 e = exp2(_mm512_mul_ps(inside, _mm512_set1_ps(2.0f * kLog2e))), one = _mm512_set1_ps(1.0f);
  return _mm512_mul_ps(_mm512_div_ps(_mm512_sub_ps(e, one), _mm512_add_ps(e, one)), _mm512_set1_ps(softcap));
}

// The keys of a tile that a row sees, a bit each.
inline uint64_t seen_keys(const Work& work, int64_t first_key, int count, int64_t position) {
  const int64_t seen = position - first_key + 1, hidden = work.window ? seen - work.window : 0;
  const int64_t to = seen < count ? seen : count;
  if (to <= 0 || hidden >= kTile) return 0;
  const uint64_t below = to == kTile ? ~uint64_t{0} : (uint64_t{1} << to) - 1;
  return hidden > 0 ? below & (~uint64_t{0} << hidden) : below;
}

inline __mmask16 part(uint64_t seen, int group) { return static_cast<__mmask16>(seen >> (group * kSide)); }

// Lane r: the highest lane of x[r].
inline __m512 highest_of_each(const __m512* x) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 one = x[i / 4 * 8 + i % 4], other = x[i / 4 * 8 + i % 4 + 4];
    a[i] = _mm512_max_ps(_mm512_shuffle_f32x4(one, other, 0x44), _mm512_shuffle_f32x4(one, other, 0xee));
  }
  // b[i] has 128 bits for each of the rows i, i + 4, i + 8, i + 12.
  for (int i = 0; i < 4; ++i)
    b[i] = _mm512_max_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_max_ps(_mm512_unpacklo_ps(b[i], b[i + 2]), _mm512_unpackhi_ps(b[i], b[i + 2]));
  const __m512d d = _mm512_castps_pd(c[0]), e = _mm512_castps_pd(c[1]);
  const __m512 pairs = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(d, e)), _mm512_castpd_ps(_mm512_unpackhi_pd(d, e)));
  // Each 128 bits now hold the rows i, i + 2, i + 1, i + 3 of four, four apart.
  return _mm512_permute_ps(pairs, 0xd8);
}

// To `to` the highest lane of each of the first `rows` vectors; of more than 4 rows, all 16 are written.
inline void store_highest(float* to, __m512* most, int rows) {
  if (rows <= kSide / 4) {
    for (int i = 0; i < rows; ++i) to[i] = _mm512_reduce_max_ps(most[i]);
    return;
  }
  for (int i = rows; i < kSide; ++i) most[i] = _mm512_set1_ps(kNone);
  _mm512_store_ps(to, highest_of_each(most));
}

// To s.base the highest of each row's scores among the keys it sees, -inf where there are none.
template <int groups> inline void find_highest(const Softmax& s, const uint64_t* seen, int r, int rows) {
  const __m512 none = _mm512_set1_ps(kNone);
  __m512 most[kSide];
  for (int i = 0; i < rows; ++i) {
    const float* x = s.scores + (r + i) * kTile;
    most[i] = none;
    for (int g = 0; g < groups; ++g) {
      const __m512 value = _mm512_load_ps(x + g * kSide);
      most[i] = _mm512_max_ps(most[i], seen ? _mm512_mask_mov_ps(none, part(seen[i], g), value) : value);
    }
  }
  store_highest(s.base + r, most, rows);
}

inline int rows_from(const Work& work, int r) { return work.num_rows - r < kSide ? work.num_rows - r : kSide; }

inline __m512 to_log2(const Work& work) {
  return _mm512_set1_ps(work.softcap != 0.0f ? kLog2e : work.scale * kLog2e);
}

// Which of a tile's keys each of the rows from r on sees: to masks; null if all rows see all keys of `groups` groups.
template <int groups>
inline const uint64_t* masks_of(const Work& work, int r, int64_t first_key, int count, int64_t lowest, uint64_t* masks) {
  if (count == groups * kSide && first_key + count - 1 <= lowest && work.window == 0) return nullptr;
  for (int i = 0; i < rows_from(work, r); ++i) masks[i] = seen_keys(work, first_key, count, work.position[r + i]);
  return masks;
}

// The rows' maxima with this tile's scores, which are capped, the base of its weights, and the factor of what was summed.
// Maxima that would rise by no more than `slack` stay: weights are at most 2^slack, and few sums have to be brought down.
template <int groups>
inline void raise_maxima(const Softmax& s, const Work& work, int r, const uint64_t* seen, float slack) {
  const int rows = rows_from(work, r);
  if (work.softcap != 0.0f)
    for (int i = r; i < r + rows; ++i)
      for (float* x = s.scores + i * kTile; x < s.scores + i * kTile + groups * kSide; x += kSide)
        _mm512_store_ps(x, capped(_mm512_mul_ps(_mm512_load_ps(x), _mm512_set1_ps(work.scale)), work.softcap));
  find_highest<groups>(s, seen, r, rows);
  const __m512 before = _mm512_load_ps(s.maximum + r);
  const __m512 highest = _mm512_mul_ps(_mm512_load_ps(s.base + r), to_log2(work));
  const __mmask16 rises = _mm512_cmp_ps_mask(highest, _mm512_add_ps(before, _mm512_set1_ps(slack)), _CMP_GT_OQ);
  const __m512 now = _mm512_mask_mov_ps(before, rises, highest);
  const __m512 base =
      _mm512_mask_mov_ps(now, _mm512_cmp_ps_mask(now, _mm512_set1_ps(kNone), _CMP_EQ_OQ), _mm512_setzero_ps());
  _mm512_store_ps(s.maximum + r, now);
  _mm512_store_ps(s.base + r, base);
  _mm512_store_ps(s.factor + r, exp2(_mm512_sub_ps(before, base)));
}

inline int64_t lowest_position(const Work& work) {
  int64_t lowest = work.position[0];
  for (int r = 1; r < work.num_rows; ++r) lowest = work.position[r] < lowest ? work.position[r] : lowest;
  return lowest;
}

}  // namespace
}  // namespace amx
}  // namespace cpu_ops
