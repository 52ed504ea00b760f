// New keys and values in 8 or 4 bits, compiled once for each instruction set. Rounding is the reference's:
// engines/ops/kv_cache.py, write_quantized_kv.

#include "kv_codes.h"

#include "elementwise_vector.h"
#include "kv_codes_vector.h"

namespace cpu_ops {
namespace ISA {
namespace {

constexpr float kTiny = 0x1p-100f;  // smallest scale
constexpr float kFp8Most = 448.0f;

// Smallest and largest of a row, both NaN if any of its numbers is not finite.
struct Range {
  float low, high;
};

template <Type type> inline Range range_of(const char* x, int64_t D) {
  Float low = all(-kNone), high = all(kNone), nothing = Float{};
  for (int64_t d = 0; d < D; d += W) {
    const Float value = load_some<type>(x + d * kBytes<type>, D - d);
    nothing += value * 0.0f;
    low = min(low, D - d >= W ? value : lanes() < static_cast<int32_t>(D - d) ? value : low);
    high = max(high, D - d >= W ? value : lanes() < static_cast<int32_t>(D - d) ? value : high);
  }
  const float bad = total(nothing);
  return {-highest(-low) + bad, highest(high) + bad};
}

// Nearest integers, ties to even, of numbers from 0 to 2^22.
inline Int nearest(Float x) {
  const Float shift = all(8388608.0f);
  return bits<Int>(x + shift) - bits<Int>(shift);
}

inline Int to_fp8(Float x) {
  const Float y = max(min(x, all(kFp8Most)), all(-kFp8Most));
  const Uint u = bits<Uint>(y), a = u & 0x7fffffffu;
  const Uint normal = ((a + 0x7ffff + ((a >> 20) & 1)) >> 20) - 960;
  const Int small = nearest(bits<Float>(a) * 512.0f);
  const Int magnitude = bits<Float>(a) >= 1.0f / 64 ? bits<Int>(normal) : small;
  return magnitude | (bits<Int>(u >> 24) & 0x80);
}

inline void store_codes(char* to, Int code, Codes codes, int64_t d, int64_t left) {
  const int64_t count = left < W ? left : W;
  const Code bytes = __builtin_convertvector(code, Code);
  if (codes != Codes::int4) {
    __builtin_memcpy(to + d, &bytes, count);
    return;
  }
  char pairs[W / 2];
  for (int i = 0; i < W / 2; ++i) pairs[i] = static_cast<char>(bytes[2 * i] | bytes[2 * i + 1] << 4);
  __builtin_memcpy(to + d / 2, pairs, (count + 1) / 2);
}

template <Type type> void quantize_row(const char* x, int64_t D, Codes codes, char* to, float* scales) {
  const Range range = range_of<type>(x, D);
  const bool fp8 = codes == Codes::fp8;
  const float most = -range.low > range.high ? -range.low : range.high;
  const float steps = codes == Codes::int8 ? 255.0f : 15.0f;
  const float wide = fp8 ? most / kFp8Most : (range.high - range.low) / steps;
  const float scale = wide < kTiny ? kTiny : wide;
  scales[0] = scale;
  if (!fp8) scales[1] = range.low;
  for (int64_t d = 0; d < D; d += W) {
    const int64_t left = D - d;
    const Float value = load_some<type>(x + d * kBytes<type>, left);
    Int code;
    if (fp8) code = to_fp8(value / scale);
    // In this order NaN, of a row that has one, becomes a number: what it means is in the scale.
    else code = nearest(max(min((value - range.low) / scale, all(steps)), Float{}));
    if (left < W) code = lanes() < static_cast<int32_t>(left) ? code : Int{};
    store_codes(to, code, codes, d, left);
  }
}

template <Type type> void quantize_tokens(const Vectors& v, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    const int64_t block = v.slots[token] / v.block_size, offset = v.slots[token] % v.block_size;
    for (int64_t head = 0; head < v.num_heads; ++head) {
      const int64_t row = (block * v.num_heads + head) * v.block_size + offset;
      const char* x = static_cast<const char*>(v.x) + (token * v.token_stride + head * v.head_stride) * kBytes<type>;
      quantize_row<type>(x, v.head_dim, v.codes, v.to + row * v.row_bytes, v.scales + row * v.numbers);
    }
  }
}

}  // namespace

void quantize_vectors(const Vectors& vectors, int64_t first, int64_t last) {
  switch (vectors.type) {
    case Type::f32: return quantize_tokens<Type::f32>(vectors, first, last);
    case Type::f16: return quantize_tokens<Type::f16>(vectors, first, last);
    case Type::bf16: return quantize_tokens<Type::bf16>(vectors, first, last);
  }
}

}  // namespace ISA
}  // namespace cpu_ops
