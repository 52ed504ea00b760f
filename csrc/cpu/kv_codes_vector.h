// Vectors of a cache in 8 or 4 bits back to float32: engines/ops/kv_cache.py says what the codes mean.
#pragma once

#include "attention_vector.h"

namespace cpu_ops {
namespace ISA {
namespace {

typedef uint8_t Code __attribute__((vector_size(W)));

// `count` codes from the d-th of a row on, a lane each; the lanes past them are zero. d is a multiple of W.
inline Int load_codes(const char* row, Codes codes, int d, int count) {
  Code bytes{};
  const bool whole = count >= W;
  if (codes != Codes::int4) {
    if (whole) bytes = load<Code>(row + d);
    else __builtin_memcpy(&bytes, row + d, count);
    return __builtin_convertvector(bytes, Int);
  }
  if (whole) __builtin_memcpy(&bytes, row + d / 2, W / 2);
  else __builtin_memcpy(&bytes, row + d / 2, (count + 1) / 2);
  Code places;
  for (int i = 0; i < W; ++i) places[i] = static_cast<uint8_t>(i / 2);
  const Int pairs = __builtin_convertvector(__builtin_shuffle(bytes, places), Int);
  return pairs >> ((lanes() & 1) * 4) & 15;
}

// e4m3: a sign, 4 bits of exponent with bias 7, 3 of mantissa; exponent 0 counts 512ths.
inline Float from_fp8(Int code) {
  const Int magnitude = code & 0x7f;
  const Float normal = bits<Float>((magnitude << 20) + (120 << 23));
  const Float value = magnitude >= 8 ? normal : __builtin_convertvector(magnitude, Float) * (1.0f / 512);
  return bits<Float>(bits<Uint>(value) | (bits<Uint>(code) & 0x80u) << 24);
}

// to is padded to whole vectors.
inline void widen_codes(float* to, const char* row, Codes codes, const float* scales, int D) {
  const Float scale = all(scales[0]), offset = all(codes == Codes::fp8 ? 0.0f : scales[1]);
  for (int d = 0; d < D; d += W) {
    const Int code = load_codes(row, codes, d, D - d);
    if (codes == Codes::fp8) store(to + d, from_fp8(code) * scale);
    else store(to + d, __builtin_convertvector(code, Float) * scale + offset);
  }
}

}  // namespace
}  // namespace ISA
}  // namespace cpu_ops
