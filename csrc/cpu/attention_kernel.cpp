// One tile of query rows against a run of keys: online softmax (arXiv 1805.02867, 2205.14135) in float32.
//
// Compiled once for each instruction set, with ISA naming it. Every score is a sum over head_dim in order, every output
// a sum over the keys in order, whatever rows are computed beside it: so the bits of a row depend on that row alone.
// Names: R rows, T keys of a tile, D head_dim, W floats of a vector register.

#include "attention.h"

#if defined(__AVX512BW__)
#define CPU_OPS_WIDTH 16
#elif defined(__AVX2__)
#define CPU_OPS_WIDTH 8
#else
#define CPU_OPS_WIDTH 4
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

// 16-bit floats in the low halves of 32-bit lanes, as float32.
template <Type type> inline Float widen(Uint half) {
  if constexpr (type == Type::bf16) return bits<Float>(half << 16);
  const Float magnitude = bits<Float>((half & 0x7fff) << 13) * 5.192296858534828e33f;  // 2^112 moves the exponent's bias
  const Uint infinite = magnitude >= 65536.0f ? Uint{} + 0x7f800000u : Uint{};
  return bits<Float>(bits<Uint>(magnitude) | infinite | ((half & 0x8000) << 16));
}

template <Type type> inline Float load_wide(const char* from) {
  if constexpr (type == Type::f32) return load<Float>(from);
  else return widen<type>(__builtin_convertvector(load<Short>(from), Uint));
}

template <Type type> constexpr int kBytes = type == Type::f32 ? 4 : 2;

inline uint16_t narrow_bf16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

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

template <Type type> inline void store_row(void* to, const float* from, int D, float factor) {
  for (int d = 0; d < D; ++d) {
    const float x = from[d] * factor;
    if constexpr (type == Type::f32) static_cast<float*>(to)[d] = x;
    else static_cast<uint16_t*>(to)[d] = type == Type::bf16 ? narrow_bf16(x) : narrow_f16(x);
  }
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

// to: [D][T], the keys as columns; columns from num_keys on are zero. Pairs of 16-bit values move as one 32-bit lane.
template <Type type> void load_keys(float* to, const char* const* rows, int num_keys, int D) {
  constexpr int bytes = kBytes<type>, wide = W * 4 / bytes;
  for (int t = 0; t < kTile; t += W) {
    for (int d = 0; d < D; d += wide) {
      const int count = D - d < wide ? D - d : wide;
      Uint v[W];
      for (int i = 0; i < W; ++i) {
        v[i] = Uint{};
        if (t + i >= num_keys) continue;
        const char* row = rows[t + i] + d * bytes;
        if (count == wide) v[i] = load<Uint>(row);
        else __builtin_memcpy(&v[i], row, count * bytes);
      }
      transpose(v);
      float* column = to + d * kTile + t;
      if constexpr (type == Type::f32) {
        for (int i = 0; i < count; ++i) store(column + i * kTile, v[i]);
      } else {
        // The buffer has a row to spare, which takes the second half of an odd last pair.
        for (int i = 0; 2 * i < count; ++i) {
          store(column + 2 * i * kTile, widen<type>(type == Type::bf16 ? v[i] : v[i] & 0xffff));
          store(column + (2 * i + 1) * kTile,
                type == Type::bf16 ? bits<Float>(v[i] & 0xffff0000u) : widen<type>(v[i] >> 16));
        }
      }
    }
  }
}

// to[r][vectors] = or += sum over n of a[r][n] * b[n][vectors]
template <int R, int V> inline void multiply(float* to, int to_stride, const float* a, int a_stride, const float* b,
                                             int b_stride, int n, const float* factor) {
  Float sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = factor ? load<Float>(to + r * to_stride + v * W) * factor[r] : Float{};
  for (int i = 0; i < n; ++i) {
    Float row[V];
    for (int v = 0; v < V; ++v) row[v] = load<Float>(b + i * b_stride + v * W);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += row[v] * a[r * a_stride + i];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(to + r * to_stride + v * W, sum[r][v]);
}

// As above for any number of rows and vectors. factor: [rows] of what `to` holds; null: it holds nothing.
template <int V> void multiply_rows(float* to, int to_stride, const float* a, int a_stride, const float* b,
                                    int b_stride, int n, const float* factor, int rows) {
  for (int r = 0; r < rows; r += kRowBlock) {
    float* o = to + r * to_stride;
    const float *x = a + r * a_stride, *f = factor ? factor + r : nullptr;
    switch (rows - r) {
      case 1: multiply<1, V>(o, to_stride, x, a_stride, b, b_stride, n, f); break;
      case 2: multiply<2, V>(o, to_stride, x, a_stride, b, b_stride, n, f); break;
      case 3: multiply<3, V>(o, to_stride, x, a_stride, b, b_stride, n, f); break;
      case 4: multiply<4, V>(o, to_stride, x, a_stride, b, b_stride, n, f); break;
      case 5: multiply<kRowBlock < 5 ? kRowBlock : 5, V>(o, to_stride, x, a_stride, b, b_stride, n, f); break;
      default: multiply<kRowBlock, V>(o, to_stride, x, a_stride, b, b_stride, n, f);
    }
  }
}

void multiply(float* to, int to_stride, const float* a, int a_stride, const float* b, int b_stride, int n,
              const float* factor, int rows, int columns) {
  int c = 0;
  for (; c + kVectorBlock * W <= columns; c += kVectorBlock * W)
    multiply_rows<kVectorBlock>(to + c, to_stride, a, a_stride, b + c, b_stride, n, factor, rows);
  for (; c < columns; c += W) multiply_rows<1>(to + c, to_stride, a, a_stride, b + c, b_stride, n, factor, rows);
}

inline float highest(Float v) {
  float x = v[0];
  for (int i = 1; i < W; ++i) x = v[i] > x ? v[i] : x;
  return x;
}

inline float total(Float v) {
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
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

// Asks for the keys and values of one tile while another is computed: blocks lie anywhere, so no hardware foresees them.
void prefetch(const Work& work, int64_t first, int row_bytes) {
  const int64_t end = first + kTile < work.end ? first + kTile : work.end;
  for (int64_t t = first; t < end; ++t) {
    const int64_t block = work.block_table[t / work.block_size], slot = t % work.block_size;
    const char* k = work.k + block * work.k_block_stride + slot * work.k_slot_stride;
    const char* v = work.v + block * work.v_block_stride + slot * work.v_slot_stride;
    for (int i = 0; i < row_bytes; i += 64) {
      __builtin_prefetch(k + i);
      __builtin_prefetch(v + i);
    }
  }
}

template <Type type> void attend_typed(const Work& work, float* scratch) {
  const int D = work.head_dim, padded = (D + 15) / 16 * 16, rows = work.num_rows;
  float* q = scratch;
  float* out = q + kRows * padded;
  float* v = out + kRows * padded;
  float* k = v + kTile * padded;
  float* scores = k + kTile * (padded + 16);
  float* maximum = scores + kRows * kTile;
  float* sum = maximum + kRows;
  float* factor = sum + kRows;
  for (int r = 0; r < rows; ++r) {
    widen_row<type>(q + r * padded, work.q[r], D);
    const float* state = work.state[r];
    const bool fresh = state == nullptr || work.store_state;
    maximum[r] = fresh ? kNone : state[0];
    sum[r] = fresh ? 0.0f : state[1];
    for (int d = 0; d < padded; ++d) out[r * padded + d] = fresh || d >= D ? 0.0f : state[kStateHeader + d];
  }
  for (int64_t first = work.begin; first < work.end; first += kTile) {
    const int count = static_cast<int>(work.end - first < kTile ? work.end - first : kTile);
    prefetch(work, first + kTile, D * kBytes<type>);
    const char* key_rows[kTile];
    for (int t = 0; t < kTile; ++t) {
      if (t >= count) {
        for (int d = 0; d < padded; ++d) v[t * padded + d] = 0.0f;
        continue;
      }
      const int64_t block = work.block_table[(first + t) / work.block_size], slot = (first + t) % work.block_size;
      key_rows[t] = work.k + block * work.k_block_stride + slot * work.k_slot_stride;
      widen_row<type>(v + t * padded, work.v + block * work.v_block_stride + slot * work.v_slot_stride, D);
    }
    load_keys<type>(k, key_rows, count, D);
    multiply(scores, kTile, q, padded, k, kTile, D, nullptr, rows, kTile);
    for (int r = 0; r < rows; ++r)
      factor[r] = weigh(scores + r * kTile, first, work.position[r], work, maximum[r], sum[r]);
    multiply(out, padded, scores, kTile, v, padded, kTile, factor, rows, D);
  }
  for (int r = 0; r < rows; ++r) {
    if (work.store_state) {
      work.state[r][0] = maximum[r];
      work.state[r][1] = sum[r];
      __builtin_memcpy(work.state[r] + kStateHeader, out + r * padded, D * sizeof(float));
      continue;
    }
    float scale = 1.0f / sum[r];
    if (work.has_sinks) {
      const float most = work.sink[r] > maximum[r] ? work.sink[r] : maximum[r];
      const float own = exp(maximum[r] - most);
      scale = own / (sum[r] * own + exp(work.sink[r] - most));
    }
    store_row<type>(work.out[r], out + r * padded, D, scale);
  }
}

}  // namespace

void attend(const Work& work, float* scratch) {
  switch (work.type) {
    case Type::f32: return attend_typed<Type::f32>(work, scratch);
    case Type::f16: return attend_typed<Type::f16>(work, scratch);
    case Type::bf16: return attend_typed<Type::bf16>(work, scratch);
  }
}

}  // namespace ISA
}  // namespace cpu_ops
