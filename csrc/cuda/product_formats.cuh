// Weights as product_kernel takes them: what lies in a stage of its pipeline, and how a lane makes of it the left factor of
// multiply_add. T: of results, and of inputs but for Int8.
//
//   Row      what a lane keeps of a group of columns of rows r and r + 8
//   Codes    of 16 rows and a chunk; fragment() is the left factor of a quarter of the chunk
//   scale()  by which sums of a group are multiplied, where kScaled
#pragma once

#include "product.h"
#include "small_floats.cuh"

namespace cuda_ops {

struct NoRow {
  __device__ __forceinline__ NoRow(const unsigned char*, int) {}
};

struct PlainCodes {
  const uint4* at;
  __device__ __forceinline__ PlainCodes(const unsigned char* codes, int tile, int lane)
      : at(reinterpret_cast<const uint4*>(codes) + tile * 128 + lane) {}
  __device__ __forceinline__ void fragment(uint32_t (&to)[4], int step, NoRow) const {
    const uint4 v = at[step * 32];
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
};

struct Unscaled {
  static constexpr bool kScaled = false;
  static constexpr int kPieces = 4, kScaleBytes = 0;
  using Codes = PlainCodes;
  using Row = NoRow;
  __device__ __forceinline__ static void copy_scales(unsigned char*, const ProductParams&, int, int, int) {}
};

// Inputs of 16 bits.
template <class T> struct HalfInputs {
  using Sum = float;
  static constexpr int kValueBytes = 2;
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add<T>(d, a, b0, b1);
  }
};

// Those, with a scale for each group of p.group_size columns, which multiplies a group's sum in float32.
template <class T> struct Grouped : HalfInputs<T> {
  static constexpr bool kScaled = true;
  // Whether a group ends with these columns.
  __device__ __forceinline__ static bool ends(const ProductParams& p, int through) {
    return through % p.group_size == 0;
  }
};

// 16-bit values.
template <class T_> struct Dense : Unscaled, HalfInputs<T_> {
  using T = T_;
};

// Signed 8-bit integers for inputs that are such too: exact sums, multiplied by both scales when they are stored.
template <class T_> struct Int8 : Unscaled {
  using T = T_;
  using Sum = int;
  static constexpr int kValueBytes = 1;
  __device__ __forceinline__ static void multiply(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add_int8(d, a, b0, b1);
  }
};

struct FourBitCodes {
  uint4 words;
  __device__ __forceinline__ FourBitCodes(const unsigned char* codes, int tile, int lane)
      : words(reinterpret_cast<const uint4*>(codes)[tile * 32 + lane]) {}
  __device__ __forceinline__ uint32_t word(int step) const {
    return step < 2 ? (step ? words.y : words.x) : (step == 2 ? words.z : words.w);
  }
};

// T(2^m + code), exactly, from a code in its lowest bits: 128 for bfloat16, 1024 for float16.
template <class T> struct Magic;
template <> struct Magic<bf16> { static constexpr uint32_t kPair = 0x43004300; };
template <> struct Magic<fp16> { static constexpr uint32_t kPair = 0x64006400; };

// 4-bit integers with a scale and a zero for each group of columns (AWQ, GPTQ): code - zero is exact in T, and the scale
// multiplies a group's sum in float32, so that no weight is rounded.
template <class T_> struct W4 : Grouped<T_> {
  using T = T_;
  static constexpr int kPieces = 1, kScaleBytes = 2 * kProductRows * 4;

  __device__ __forceinline__ static void copy_scales(unsigned char* to, const ProductParams& p, int expert, int row,
                                                     int chunk) {
    const int thread = threadIdx.x, halves = p.group_size == 32 ? 2 : 1;
    if (thread >= halves * (kProductRows / 4)) return;
    const int half = thread / (kProductRows / 4), four = thread % (kProductRows / 4) * 4;
    const int64_t group = static_cast<int64_t>(expert) * p.scale_rows + (chunk * 64 + half * 32) / p.group_size;
    const uint32_t* from = static_cast<const uint32_t*>(p.scales) + group * p.padded_out + row + four;
    copy_async(to + (half * kProductRows + four) * 4, from, true);
  }
  __device__ __forceinline__ static const unsigned char* group(const unsigned char* scales, const ProductParams& p,
                                                               int half, int row) {
    return scales + ((p.group_size == 32 ? half * kProductRows : 0) + row) * 4;
  }
  struct Row {
    uint32_t zeros[2];
    __device__ __forceinline__ Row(const unsigned char* group, int row) {
      const uint32_t* own = reinterpret_cast<const uint32_t*>(group) + row;
      zeros[0] = Magic<T>::kPair | (own[0] & 0xFF) * 0x00010001u;
      zeros[1] = Magic<T>::kPair | (own[8] & 0xFF) * 0x00010001u;
    }
  };
  struct Codes : FourBitCodes {
    using FourBitCodes::FourBitCodes;
    __device__ __forceinline__ void fragment(uint32_t (&to)[4], int step, const Row& row) const {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        to[j] = subtract_pairs<T>((this->word(step) >> (4 * j) & 0x000F000Fu) | Magic<T>::kPair, row.zeros[j % 2]);
    }
  };
  __device__ __forceinline__ static float scale(const unsigned char* group, int row, const ProductParams& p) {
    const uint32_t own = reinterpret_cast<const uint32_t*>(group)[row];
    return p.scales_are_bf16 ? bits_float(own & 0xFFFF0000u) : half_bits_to_float(static_cast<uint16_t>(own >> 16));
  }
};

// 4-bit floats in groups of 32 columns that share a power of two, which multiplies a group's sum in float32.
template <class T_> struct Mxfp4 : Grouped<T_> {
  using T = T_;
  static constexpr int kPieces = 1, kScaleBytes = 2 * kProductRows;
  using Row = NoRow;

  __device__ __forceinline__ static void copy_scales(unsigned char* to, const ProductParams& p, int expert, int row,
                                                     int chunk) {
    const int thread = threadIdx.x;
    if (thread >= 2 * (kProductRows / 16)) return;
    const int half = thread / (kProductRows / 16), sixteen = thread % (kProductRows / 16) * 16;
    const int64_t group = static_cast<int64_t>(expert) * p.scale_rows + chunk * 2 + half;
    const unsigned char* from = static_cast<const unsigned char*>(p.scales) + group * p.padded_out + row + sixteen;
    copy_async(to + half * kProductRows + sixteen, from, true);
  }
  __device__ __forceinline__ static const unsigned char* group(const unsigned char* scales, const ProductParams&,
                                                               int half, int row) {
    return scales + half * kProductRows + row;
  }
  struct Codes : FourBitCodes {
    using FourBitCodes::FourBitCodes;
    __device__ __forceinline__ void fragment(uint32_t (&to)[4], int step, NoRow) const {
#pragma unroll
      for (int j = 0; j < 4; ++j) to[j] = small_floats<T, E2M1>(this->word(step) >> (4 * j));
    }
  };
  __device__ __forceinline__ static bool ends(const ProductParams&, int) { return true; }
  __device__ __forceinline__ static float scale(const unsigned char* group, int row, const ProductParams&) {
    const uint32_t exponent = group[row];
    return bits_float(exponent ? exponent << 23 : 1u << 22);  // 2^-127 is subnormal
  }
};

// 8-bit floats for 16-bit inputs, with a scale for each group of columns, which multiplies a group's sum in float32.
template <class T_> struct Fp8 : Grouped<T_> {
  using T = T_;
  static constexpr int kPieces = 2, kScaleBytes = kProductRows * 4;
  using Row = NoRow;

  __device__ __forceinline__ static void copy_scales(unsigned char* to, const ProductParams& p, int expert, int row,
                                                     int chunk) {
    const int four = threadIdx.x * 4;
    if (four >= kProductRows) return;
    const int64_t group = static_cast<int64_t>(expert) * p.scale_rows + chunk * 64 / p.group_size;
    copy_async(to + four * 4, static_cast<const float*>(p.scales) + group * p.padded_out + row + four, true);
  }
  __device__ __forceinline__ static const unsigned char* group(const unsigned char* scales, const ProductParams&, int,
                                                               int row) {
    return scales + row * 4;
  }
  struct Codes {
    uint4 words[2];
    __device__ __forceinline__ Codes(const unsigned char* codes, int tile, int lane) {
      const uint4* own = reinterpret_cast<const uint4*>(codes) + tile * 64 + lane;
      words[0] = own[0], words[1] = own[32];
    }
    __device__ __forceinline__ void fragment(uint32_t (&to)[4], int step, NoRow) const {
      const uint4 four = words[step / 2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t word = step % 2 ? (j < 2 ? four.z : four.w) : (j < 2 ? four.x : four.y);
        to[j] = small_floats<T, E4M3>(word >> (j % 2 * 8));
      }
    }
  };
  __device__ __forceinline__ static float scale(const unsigned char* group, int row, const ProductParams&) {
    return reinterpret_cast<const float*>(group)[row];
  }
};

}  // namespace cuda_ops
