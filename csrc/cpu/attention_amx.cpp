// bfloat16 attention on the matrix unit (AMX): as attention_kernel.cpp, with products by tiles of 16 x 16.
//
// Both products take bfloat16 and sum in float32. The weights go in as a sum of two bfloat16 numbers, so that they keep
// 16 bits and not 8. A row of a product does not depend on the rows beside it. Source of the layouts: Intel 64 and
// IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS: the second factor has pairs of rows interleaved.

#include <immintrin.h>

#include "attention_vector.h"

namespace cpu_ops {
namespace ISA {
namespace {

constexpr int kSide = 16;
constexpr int kPairs = kTile / 2;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// to: [D / 2][T] pairs, zero from D and from rows.count on.
void pair_keys(uint32_t* to, const Rows& rows, const Rows& next, int D, int padded) {
  for (int t = 0; t < kTile; t += W) {
    for (int i = t; i < t + W && i < next.count; ++i) prefetch(next.k[i], D * 2);
    for (int d = 0; d < padded; d += 2 * W) {
      const int values = D - d < 2 * W ? D - d : 2 * W;
      Uint v[W];
      for (int i = 0; i < W; ++i) {
        v[i] = Uint{};
        if (t + i >= rows.count) continue;
        const char* row = rows.k[t + i] + d * 2;
        if (values == 2 * W) v[i] = load<Uint>(row);
        else __builtin_memcpy(&v[i], row, values * 2);
      }
      transpose(v);
      for (int i = 0; i < W; ++i) store(to + (d / 2 + i) * kTile + t, v[i]);
    }
  }
}

// to: [T / 2][D] pairs of keys 2 i and 2 i + 1, zero from D and from rows.count on.
void pair_values(uint32_t* to, const Rows& rows, const Rows& next, int D, int padded) {
  for (int t = 0; t < kTile; t += 2) {
    for (int i = t; i < t + 2 && i < next.count; ++i) prefetch(next.v[i], D * 2);
    const char* even = t < rows.count ? rows.v[t] : nullptr;
    const char* odd = t + 1 < rows.count ? rows.v[t + 1] : nullptr;
    for (int d = 0; d < padded; d += W) {
      const int left = D - d, bytes = left <= 0 ? 0 : left < W ? 2 * left : 2 * W;
      Short a = Short{}, b = Short{};
      if (bytes == 2 * W) {
        if (even) a = load<Short>(even + 2 * d);
        if (odd) b = load<Short>(odd + 2 * d);
      } else {
        if (even) __builtin_memcpy(&a, even + 2 * d, bytes);
        if (odd) __builtin_memcpy(&b, odd + 2 * d, bytes);
      }
      store(to + t / 2 * padded + d, __builtin_convertvector(a, Uint) | (__builtin_convertvector(b, Uint) << 16));
    }
  }
}

// scores[rows][T] = q @ keys
void score(float* scores, const uint16_t* q, const uint32_t* keys, int rows, int padded) {
  for (int r = 0; r < rows; r += kSide) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int d = 0; d < padded; d += 32) {
      const uint32_t* b = keys + d / 2 * kTile;
      _tile_loadd(4, q + r * padded + d, padded * 2);
      _tile_loadd(5, b, kTile * 4);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, b + 16, kTile * 4);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(5, b + 32, kTile * 4);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(6, b + 48, kTile * 4);
      _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, scores + r * kTile, kTile * 4);
    _tile_stored(1, scores + r * kTile + 16, kTile * 4);
    _tile_stored(2, scores + r * kTile + 32, kTile * 4);
    _tile_stored(3, scores + r * kTile + 48, kTile * 4);
  }
}

// One row's weights as the bfloat16 nearest to each, and that nearest to the rest.
inline void split(uint16_t* high, uint16_t* low, const float* weights) {
  for (int t = 0; t < kTile; t += W) {
    const Float x = load<Float>(weights + t);
    const Uint u = bits<Uint>(x), rounded = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
    const Uint rest = bits<Uint>(x - bits<Float>(rounded));
    store(high + t, __builtin_convertvector(rounded >> 16, Short));
    store(low + t, __builtin_convertvector((rest + 0x7fff + ((rest >> 16) & 1)) >> 16, Short));
  }
}

// out[rows][D] += (high + low) @ values
void accumulate(float* out, const uint16_t* high, const uint16_t* low, const uint32_t* values, int rows, int padded) {
  for (int r = 0; r < rows; r += kSide) {
    for (int d = 0; d < padded; d += 32) {
      float* to = out + r * padded + d;
      _tile_loadd(0, to, padded * 4);
      _tile_loadd(1, to + 16, padded * 4);
      for (int t = 0; t < kPairs; t += 16) {
        const uint32_t* b = values + t * padded + d;
        _tile_loadd(4, high + r * kTile + 2 * t, kTile * 2);
        _tile_loadd(5, low + r * kTile + 2 * t, kTile * 2);
        _tile_loadd(6, b, padded * 4);
        _tile_loadd(7, b + 16, padded * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(0, 5, 6);
        _tile_dpbf16ps(1, 5, 7);
      }
      _tile_stored(0, to, padded * 4);
      _tile_stored(1, to + 16, padded * 4);
    }
  }
}

void attend_rows(const Work& work, float* scratch) {
  const int D = work.head_dim, padded = (D + 31) / 32 * 32, rows = work.num_rows;
  float* out = scratch;
  float* scores = out + kRows * padded;
  uint32_t* keys = reinterpret_cast<uint32_t*>(scores + kRows * kTile);
  uint32_t* values = keys + kPairs * padded;  // kTile * padded / 2 pairs
  uint16_t* q = reinterpret_cast<uint16_t*>(values + kPairs * padded);
  uint16_t* high = q + kRows * padded;
  uint16_t* low = high + kRows * kTile;
  float* maximum = reinterpret_cast<float*>(low + kRows * kTile);
  float* sum = maximum + kRows;
  // Rows up to a multiple of 16 are multiplied as well, with whatever lies there: no other row sees it.
  for (int r = 0; r < rows; ++r) {
    __builtin_memset(q + r * padded, 0, padded * 2);
    __builtin_memcpy(q + r * padded, work.q[r], D * 2);
  }
  start(work, out, padded, maximum, sum);
  Rows located[2];
  Rows *now = &located[0], *next = &located[1];
  locate(*next, work, work.begin);
  for (int64_t first = work.begin; first < work.end; first += kTile) {
    Rows* const done = now;
    now = next;
    next = done;
    locate(*next, work, first + kTile);
    pair_keys(keys, *now, *next, D, padded);
    pair_values(values, *now, *next, D, padded);
    score(scores, q, keys, rows, padded);
    for (int r = 0; r < rows; ++r) {
      float* weights = scores + r * kTile;
      const float factor = weigh(weights, first, work.position[r], work, maximum[r], sum[r]);
      split(high + r * kTile, low + r * kTile, weights);
      if (factor == 1.0f) continue;
      for (int d = 0; d < padded; d += W) {
        float* to = out + r * padded + d;
        store(to, load<Float>(to) * factor);
      }
    }
    accumulate(out, high, low, values, rows, padded);
  }
  finish<Type::bf16>(work, out, padded, maximum, sum);
}

}  // namespace

// The tiles' shape is the thread's: others (oneDNN) find theirs as they left it.
void attend(const Work& work, float* scratch) {
  const TileConfig ours;
  TileConfig theirs;
  _tile_storeconfig(&theirs);
  _tile_loadconfig(&ours);
  attend_rows(work, scratch);
  if (theirs.palette) _tile_loadconfig(&theirs);
  else _tile_release();
}

}  // namespace ISA
}  // namespace cpu_ops
