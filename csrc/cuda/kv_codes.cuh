// Keys and values in 8 or 4 bits: a vector of a token and a head has a scale of its own. Contract: engines/ops/kv_cache.py.
//
//   int8, int4  x = code * scale + offset, codes from 0; int4: dimension 2 i in the lower half of byte i
//   fp8         x = code * scale, codes in E4M3 (arXiv 2209.05433)
//
// Scales are [num_blocks, num_kv_heads, block_size, kv_numbers(form)] float32.
#pragma once

#include <cmath>

#include "small_floats.cuh"

namespace cuda_ops {

enum class Form { int8, int4, fp8 };

constexpr __host__ __device__ int kv_numbers(Form form) { return form == Form::fp8 ? 1 : 2; }
constexpr __host__ __device__ int kv_width(Form form, int head_dim) {  // bytes of a vector
  return form == Form::int4 ? (head_dim + 1) / 2 : head_dim;
}

// ---- to codes ----

constexpr float kSmallestScale = 0x1p-100f;
constexpr float kLargestE4M3 = 448.0f;

// Scale and offset of a vector whose numbers lie between low and high; NaN where one of them is.
struct KvScale {
  float scale, offset;
};
__device__ __forceinline__ KvScale kv_scale(Form form, float low, float high) {
  if (form != Form::fp8) {
    const float scale = (high - low) / (form == Form::int8 ? 255.0f : 15.0f);
    return {scale < kSmallestScale ? kSmallestScale : scale, low};
  }
  const float scale = (-low > high ? -low : high) / kLargestE4M3;
  return {scale < kSmallestScale ? kSmallestScale : scale, 0.0f};
}
__device__ __forceinline__ uint8_t kv_code(Form form, float x, KvScale by) {
  const float most = form == Form::int8 ? 255.0f : form == Form::int4 ? 15.0f : kLargestE4M3;
  const float least = form == Form::fp8 ? -kLargestE4M3 : 0.0f;
  const float code = (x - by.offset) / by.scale, rounded = form == Form::fp8 ? code : rintf(code);
  const float within = rounded > most ? most : rounded < least ? least : rounded;
  return static_cast<uint8_t>(form == Form::fp8 ? pack_e4m3(within, 0.0f) & 0xFF : static_cast<uint32_t>(within));
}

// ---- from codes ----

__device__ __forceinline__ float from_e4m3(uint32_t code) {
  return half_bits_to_float(static_cast<uint16_t>((code & 0x80) << 8 | (code & 0x7F) << 7)) * 256.0f;
}

// Two codes, in the lowest bits of both halves of x, as numbers of T that stand for code - kCenter (fp8: the number
// itself over kUnit). Other bits of x do not matter. Exact: codes become mantissas beside an exponent that makes their
// last bit 1, as in arXiv 2211.10017.
template <class T, Form FORM> struct CodePairs;
template <> struct CodePairs<fp16, Form::int8> {
  static constexpr float kCenter = 128.0f, kUnit = 1.0f;
  __device__ __forceinline__ static uint32_t make(uint32_t x) {
    return subtract_pairs<fp16>(and_or(x, 0x00FF00FF, 0x64006400), 0x64806480);
  }
};
template <> struct CodePairs<bf16, Form::int8> {
  static constexpr float kCenter = 128.0f, kUnit = 1.0f;
  // 7 bits of mantissa: 128 + code % 128, less 256 or 128 as the code's upper bit says.
  __device__ __forceinline__ static uint32_t make(uint32_t x) {
    return subtract_pairs<bf16>(and_or(x, 0x007F007F, 0x43004300), not_and_or(x, 0x00800080, 0x43004300));
  }
};
template <> struct CodePairs<fp16, Form::int4> {
  static constexpr float kCenter = 8.0f, kUnit = 1.0f;
  __device__ __forceinline__ static uint32_t make(uint32_t x) {
    return subtract_pairs<fp16>(and_or(x, 0x000F000F, 0x64006400), 0x64086408);
  }
};
template <> struct CodePairs<bf16, Form::int4> {
  static constexpr float kCenter = 8.0f, kUnit = 1.0f;
  __device__ __forceinline__ static uint32_t make(uint32_t x) {
    return subtract_pairs<bf16>(and_or(x, 0x000F000F, 0x43004300), 0x43084308);
  }
};
template <> struct CodePairs<fp16, Form::fp8> {
  static constexpr float kCenter = 0.0f, kUnit = 256.0f;
  __device__ __forceinline__ static uint32_t make(uint32_t x) { return (x & 0x00800080) << 8 | (x & 0x007F007F) << 7; }
};
template <> struct CodePairs<bf16, Form::fp8> {
  static constexpr float kCenter = 0.0f, kUnit = 1.0f;
  __device__ __forceinline__ static uint32_t make(uint32_t x) { return small_floats<bf16, E4M3>(x); }
};

}  // namespace cuda_ops
