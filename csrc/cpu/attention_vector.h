// Vectors of the instruction set that a kernel is compiled for, and the softmax of one row on them: what the kernels of
// attention have in common. Each kernel file includes it once, with ISA naming its namespace.
#pragma once

#include "attention.h"

#if defined(__AVX512BW__)
#define CPU_OPS_WIDTH 16
#elif defined(__AVX2__)
#define CPU_OPS_WIDTH 8
#else
#define CPU_OPS_WIDTH 4
#endif

#if defined(__F16C__)
#include <immintrin.h>  // its functions are always inlined
#endif

namespace cpu_ops {
namespace ISA {
namespace {

constexpr int W = CPU_OPS_WIDTH;
constexpr int kRowBlock = W == 16 ? 6 : 4;     // rows and vectors of them that fit the registers as accumulators
constexpr int kVectorBlock = W == 16 ? 4 : 2;

typedef float Float __attribute__((vector_size(W * 4)));
typedef int32_t Int __attribute__((vector_size(W * 4)));
typedef uint32_t Uint __attribute__((vector_size(W * 4)));
typedef uint16_t Short __attribute__((vector_size(W * 2)));

template <class V> inline V load(const void* from) { V v; __builtin_memcpy(&v, from, sizeof v); return v; }
template <class V> inline void store(void* to, V v) { __builtin_memcpy(to, &v, sizeof v); }
template <class To, class From> inline To bits(From v) { To r; __builtin_memcpy(&r, &v, sizeof r); return r; }
inline Float all(float x) { return Float{} + x; }
inline Float max(Float a, Float b) { return a > b ? a : b; }
inline Float min(Float a, Float b) { return a < b ? a : b; }
inline Int lanes() { Int v; for (int i = 0; i < W; ++i) v[i] = i; return v; }
constexpr float kNone = -__builtin_inff();

// e^x, within 2 units of the last place; 0 below -87.3, so for -inf as well. Cephes' polynomial.
inline Float exp(Float x) {
  const Float shift = all(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the rounded integer
  const Float low = all(-87.3f), clamped = min(max(x, low), all(88.0f));
  const Float shifted = clamped * 1.44269504088896341f + shift, n = shifted - shift;
  const Float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Float p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Float scale = bits<Float>((bits<Int>(shifted) << 23) + 0x3f800000);
  return x < low ? Float{} : p * scale;
}

inline float exp(float x) { return exp(all(x))[0]; }

inline Float tanh(Float x) {
  const Float e = exp(min(max(x, all(-10.0f)), all(10.0f)) * 2.0f);
  return (e - 1.0f) / (e + 1.0f);
}

#if defined(__F16C__)
#if CPU_OPS_WIDTH == 16
inline Float from_f16(Short x) { return bits<Float>(_mm512_cvtph_ps(bits<__m256i>(x))); }
inline Short to_f16(Float x) { return bits<Short>(_mm512_cvtps_ph(bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT)); }
#else
inline Float from_f16(Short x) { return bits<Float>(_mm256_cvtph_ps(bits<__m128i>(x))); }
inline Short to_f16(Float x) { return bits<Short>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT)); }
#endif
#endif

// 16-bit floats in the low halves of 32-bit lanes, as float32.
template <Type type> inline Float widen(Uint half) {
  if constexpr (type == Type::bf16) return bits<Float>(half << 16);
#if defined(__F16C__)
  return from_f16(__builtin_convertvector(half, Short));
#endif
  const Float magnitude = bits<Float>((half & 0x7fff) << 13) * 5.192296858534828e33f;  // 2^112 moves the exponent's bias
  const Uint infinite = magnitude >= 65536.0f ? Uint{} + 0x7f800000u : Uint{};
  return bits<Float>(bits<Uint>(magnitude) | infinite | ((half & 0x8000) << 16));
}

template <Type type> inline Float load_wide(const char* from) {
  if constexpr (type == Type::f32) return load<Float>(from);
#if defined(__F16C__)
  else if constexpr (type == Type::f16) return from_f16(load<Short>(from));
#endif
  else return widen<type>(__builtin_convertvector(load<Short>(from), Uint));
}

template <Type type> constexpr int kBytes = type == Type::f32 ? 4 : 2;

// To the nearest, ties to even.
inline uint16_t narrow_f16(float x) {
  const uint32_t u = bits<uint32_t>(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (a >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);                       // 65520 and more
  if (a < 0x38800000) {                                                                   // subnormal: count 2^-24ths
    const float counted = bits<float>(a) + 0.5f;                                          // whose spacing below 1 is 2^-24
    return static_cast<uint16_t>(sign | (bits<uint32_t>(counted) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
}

// x in a 16-bit type, in the low halves of 32-bit lanes.
template <Type type> inline Uint narrow(Float x) {
  if constexpr (type == Type::bf16) {
    const Uint u = bits<Uint>(x);
    return x == x ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : Uint{} + 0x7fc0;
  }
#if defined(__F16C__)
  return __builtin_convertvector(to_f16(x), Uint);
#endif
  Uint halves{};
  for (int i = 0; i < W; ++i) halves[i] = narrow_f16(x[i]);
  return halves;
}

// The first `count` lanes; all of them if count is W or more.
template <Type type> inline void store_some(char* to, Float x, int64_t count) {
  if constexpr (type == Type::f32) {
    if (count >= W) store(to, x);
    else __builtin_memcpy(to, &x, count * 4);
  } else {
    const Short halves = __builtin_convertvector(narrow<type>(x), Short);
    if (count >= W) store(to, halves);
    else __builtin_memcpy(to, &halves, count * 2);
  }
}

template <Type type> inline void store_row(void* to, const float* from, int D, float factor) {
  // from is padded to whole vectors.
  for (int d = 0; d < D; d += W)
    store_some<type>(static_cast<char*>(to) + d * kBytes<type>, load<Float>(from + d) * factor, D - d);
}

template <Type type> inline void widen_row(float* to, const void* from, int D) {
  const char* source = static_cast<const char*>(from);
  int d = 0;
  for (; d + W <= D; d += W) store(to + d, load_wide<type>(source + d * kBytes<type>));
  if (d < D) {
    char tail[W * 4] = {};
    __builtin_memcpy(tail, source + d * kBytes<type>, (D - d) * kBytes<type>);
    store(to + d, load_wide<type>(tail));
  }
}

template <int step> inline void transpose_step(Uint* v) {
  Int low, high;
  for (int i = 0; i < W; ++i) {
    low[i] = i & step ? W + i - step : i;
    high[i] = i & step ? W + i : i + step;
  }
  for (int i = 0; i < W; ++i) {
    if (i & step) continue;
    const Uint a = v[i], b = v[i + step];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + step] = __builtin_shuffle(a, b, high);
  }
}

inline void transpose(Uint* v) {
  transpose_step<1>(v);
  transpose_step<2>(v);
  if constexpr (W >= 8) transpose_step<4>(v);
  if constexpr (W >= 16) transpose_step<8>(v);
}

// v's lanes in the order that brings lane i + half, cyclically, to lane i.
inline Float rotate(Float v, int half) { return __builtin_shuffle(v, (lanes() + half) & (W - 1)); }

inline float highest(Float v) {
  for (int half = W / 2; half; half /= 2) v = max(v, rotate(v, half));
  return v[0];
}

inline float total(Float v) {
  for (int half = W / 2; half; half /= 2) v += rotate(v, half);
  return v[0];
}

// Scores of one row become weights against the row's running maximum. Returns the factor of what was summed before.
inline float weigh(float* scores, int64_t first_key, int64_t position, const Work& work, float& maximum, float& sum) {
  const int64_t last = position - first_key + 1;
  const int64_t first = work.window ? position - work.window + 1 - first_key : 0;
  if (last <= 0 || first >= kTile) {
    for (int t = 0; t < kTile; ++t) scores[t] = 0.0f;
    return 1.0f;
  }
  const bool masked = last < kTile || first > 0;
  const int from = static_cast<int>(first > 0 ? first : 0), to = static_cast<int>(last < kTile ? last : kTile);
  Float most = all(kNone);
  for (int t = 0; t < kTile; t += W) {
    Float x = load<Float>(scores + t) * work.scale;
    if (work.softcap != 0.0f) x = tanh(x / work.softcap) * work.softcap;
    if (masked) {
      const Int key = lanes() + t;
      x = (key >= from) & (key < to) ? x : all(kNone);
    }
    store(scores + t, x);
    most = max(most, x);
  }
  const float tile_most = highest(most), next = tile_most > maximum ? tile_most : maximum;
  const float base = next == kNone ? 0.0f : next;
  const float factor = exp(maximum - base);
  Float added = Float{};
  for (int t = 0; t < kTile; t += W) {
    const Float weight = exp(load<Float>(scores + t) - base);
    store(scores + t, weight);
    added += weight;
  }
  maximum = next;
  sum = sum * factor + total(added);
  return factor;
}

// Where the cache holds the keys and values of one tile.
struct Rows {
  int count;
  const char* k[kTile];
  const char* v[kTile];
  const float* k_scales[kTile];  // if there are codes
  const float* v_scales[kTile];
};

inline void locate(Rows& rows, const Work& work, int64_t first) {
  const int64_t left = work.end - first;
  rows.count = left <= 0 ? 0 : left < kTile ? static_cast<int>(left) : kTile;
  if (rows.count == 0) return;
  const int32_t* table = work.block_table + first / work.block_size;
  int64_t slot = first % work.block_size;
  for (int t = 0; t < rows.count; ++table, slot = 0) {
    const char* k = work.k + *table * work.k_block_stride + slot * work.k_slot_stride;
    const char* v = work.v + *table * work.v_block_stride + slot * work.v_slot_stride;
    for (; slot < work.block_size && t < rows.count; ++slot, ++t, k += work.k_slot_stride, v += work.v_slot_stride) {
      rows.k[t] = k;
      rows.v[t] = v;
      if (work.codes == Codes::none) continue;
      const int64_t at = *table * work.scales_block_stride + slot * work.scales_slot_stride;
      rows.k_scales[t] = work.k_scales + at;
      rows.v_scales[t] = work.v_scales + at;
    }
  }
}

// Asks for a row of the next tile: blocks lie anywhere, so no hardware foresees them.
inline void prefetch(const char* row, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

// What a row's sums begin with: nothing, or the state that its prefix group left. out's padding becomes zero.
inline void start(const Work& work, float* out, int stride, float* maximum, float* sum) {
  const int D = work.head_dim;
  for (int r = 0; r < work.num_rows; ++r) {
    const float* state = work.state[r];
    const bool fresh = state == nullptr || work.store_state;
    maximum[r] = fresh ? kNone : state[0];
    sum[r] = fresh ? 0.0f : state[1];
    __builtin_memset(out + r * stride, 0, stride * sizeof(float));
    if (!fresh) __builtin_memcpy(out + r * stride, state + kStateHeader, D * sizeof(float));
  }
}

// From running maximum, sum and weighted values of each row to its output, or to its state.
template <Type type> void finish(const Work& work, const float* out, int stride, const float* maximum, const float* sum) {
  const int D = work.head_dim;
  for (int r = 0; r < work.num_rows; ++r) {
    if (work.store_state) {
      work.state[r][0] = maximum[r];
      work.state[r][1] = sum[r];
      __builtin_memcpy(work.state[r] + kStateHeader, out + r * stride, D * sizeof(float));
      continue;
    }
    float scale = 1.0f / sum[r];
    if (work.has_sinks) {
      const float most = work.sink[r] > maximum[r] ? work.sink[r] : maximum[r];
      const float own = exp(maximum[r] - most);
      scale = own / (sum[r] * own + exp(work.sink[r] - most));
    }
    store_row<type>(work.out[r], out + r * stride, D, scale);
  }
}

}  // namespace
}  // namespace ISA
}  // namespace cpu_ops
