// Weights as product_kernel takes them: what lies in a stage of its pipeline, and how a lane makes of it the left factor of
// multiply_add. T: of results, and of inputs but for Int8.
//
//   Codes         a lane's of 16 rows and a chunk; fragment() is the left factor of a quarter of the chunk
//   Row           what a lane keeps of a group of columns of rows r and r + 8, loaded from where row r's scales lie in a
//                 stage, kRowBytes a row; scales(): by which sums of the group are multiplied, where kScaled
//   two_groups()  whether the halves of a chunk are of different groups; the second's scales lie kHalfBytes further on
#pragma once

#include "product.h"
#include "small_floats.cuh"

namespace cuda_ops {

struct NoRow {
  __device__ __forceinline__ void load(const unsigned char*, int) {}
};

// Copies of scales to the stages, 16 bytes of a group by a thread.
struct ScaleCopies {
  __device__ __forceinline__ void next(unsigned char* scales) {
    if (!copies) return;
    copy_async(scales + to, from, true);
    if (--left) return;
    from += step;
    left = chunks;
  }
  const unsigned char* from;
  int64_t step;          // bytes to the next group
  int to, chunks, left;  // in a stage; of a group, and until the next
  bool copies;
};

// Of scales of BYTES each, of which a stage has those of HALVES groups.
template <int BYTES>
__device__ __forceinline__ ScaleCopies copies_of_scales(const ProductParams& p, int expert, int row, int chunk, int halves) {
  constexpr int kThreads = kProductRows * BYTES / 16;  // that copy a group
  const int thread = threadIdx.x, half = thread / kThreads, at = thread % kThreads * 16;
  const int chunks = p.group_size > 64 ? p.group_size / 64 : 1;
  const int64_t group = static_cast<int64_t>(expert) * p.scale_rows + (halves == 2 ? 2 * chunk + half : chunk / chunks);
  const int64_t row_bytes = static_cast<int64_t>(p.padded_out) * BYTES;
  return {static_cast<const unsigned char*>(p.scales) + group * row_bytes + row * BYTES + at, halves * row_bytes,
          keep(half * kProductRows * BYTES + at), chunks, chunks - chunk % chunks, thread < halves * kThreads};
}

struct PlainCodes {
  const uint4* at;
  __device__ __forceinline__ PlainCodes(const unsigned char* codes) : at(reinterpret_cast<const uint4*>(codes)) {}
  __device__ __forceinline__ void fragment(uint32_t (&to)[4], int step, const NoRow&) const {
    const uint4 v = at[step * 32];
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
};

struct Unscaled {
  static constexpr bool kScaled = false, kShort = true;
  static constexpr int kPieces = 4, kScaleBytes = 0, kRowBytes = 0, kHalfBytes = 0;
  using Codes = PlainCodes;
  using Row = NoRow;
  __device__ __forceinline__ static bool two_groups(const ProductParams&) { return false; }
};

// Inputs of 16 bits.
template <class T> struct HalfInputs {
  using Sum = float;
  static constexpr int kValueBytes = 2;
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add<T>(d, a, b0, b1);
  }
};

// Those, with a scale of BYTES for each group of p.group_size columns, which multiplies a group's sum in float32. A stage
// has room for those of HALVES groups. SHORT: no group goes on from one chunk to the next.
template <class T, int BYTES, int HALVES, bool SHORT> struct Grouped : HalfInputs<T> {
  static constexpr bool kScaled = true, kShort = SHORT;
  static constexpr int kRowBytes = BYTES, kHalfBytes = kProductRows * BYTES, kScaleBytes = HALVES * kHalfBytes;
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
  __device__ __forceinline__ FourBitCodes(const unsigned char* codes) : words(*reinterpret_cast<const uint4*>(codes)) {}
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
template <class T_> struct W4 : Grouped<T_, 4, 2, false> {
  using T = T_;
  static constexpr int kPieces = 1;

  __device__ __forceinline__ static bool two_groups(const ProductParams& p) { return p.group_size == 32; }
  __device__ __forceinline__ static ScaleCopies scale_copies(const ProductParams& p, int expert, int row, int chunk) {
    return copies_of_scales<4>(p, expert, row, chunk, two_groups(p) ? 2 : 1);
  }
  struct Row {
    uint32_t words[2], zeros[2];
    __device__ __forceinline__ void load(const unsigned char* group, int row) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        words[i] = reinterpret_cast<const uint32_t*>(group)[row + 8 * i];
        zeros[i] = Magic<T>::kPair | select_bytes(words[i], 0, 0x4040);  // of both halves the lowest byte
      }
    }
    __device__ __forceinline__ void scales(float (&to)[2], const ProductParams& p) const {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        to[i] = p.scales_are_bf16 ? bits_float(words[i] & 0xFFFF0000u)
                                  : half_bits_to_float(static_cast<uint16_t>(words[i] >> 16));
    }
  };
  struct Codes : FourBitCodes {
    using FourBitCodes::FourBitCodes;
    __device__ __forceinline__ void fragment(uint32_t (&to)[4], int step, const Row& row) const {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        to[j] = subtract_pairs<T>(and_or(this->word(step) >> (4 * j), 0x000F000Fu, Magic<T>::kPair), row.zeros[j % 2]);
    }
  };
};

// 4-bit floats in groups of 32 columns that share a power of two, which multiplies a group's sum in float32.
template <class T_> struct Mxfp4 : Grouped<T_, 1, 2, true> {
  using T = T_;
  static constexpr int kPieces = 1;

  __device__ __forceinline__ static bool two_groups(const ProductParams&) { return true; }
  __device__ __forceinline__ static ScaleCopies scale_copies(const ProductParams& p, int expert, int row, int chunk) {
    return copies_of_scales<1>(p, expert, row, chunk, 2);
  }
  struct Row {
    uint32_t exponents[2];
    __device__ __forceinline__ void load(const unsigned char* group, int row) {
      exponents[0] = group[row], exponents[1] = group[row + 8];
    }
    __device__ __forceinline__ void scales(float (&to)[2], const ProductParams&) const {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        to[i] = bits_float(exponents[i] ? exponents[i] << 23 : 1u << 22);  // 2^-127 is subnormal
    }
  };
  struct Codes : FourBitCodes {
    using FourBitCodes::FourBitCodes;
    __device__ __forceinline__ void fragment(uint32_t (&to)[4], int step, const Row&) const {
#pragma unroll
      for (int j = 0; j < 4; ++j) to[j] = small_floats<T, E2M1>(this->word(step) >> (4 * j));
    }
  };
};

// 8-bit floats for 16-bit inputs, with a scale for each group of columns, which multiplies a group's sum in float32.
template <class T_> struct Fp8 : Grouped<T_, 4, 1, false> {
  using T = T_;
  static constexpr int kPieces = 2;

  __device__ __forceinline__ static bool two_groups(const ProductParams&) { return false; }
  __device__ __forceinline__ static ScaleCopies scale_copies(const ProductParams& p, int expert, int row, int chunk) {
    return copies_of_scales<4>(p, expert, row, chunk, 1);
  }
  struct Row {
    float own[2];
    __device__ __forceinline__ void load(const unsigned char* group, int row) {
      own[0] = reinterpret_cast<const float*>(group)[row], own[1] = reinterpret_cast<const float*>(group)[row + 8];
    }
    __device__ __forceinline__ void scales(float (&to)[2], const ProductParams&) const { to[0] = own[0], to[1] = own[1]; }
  };
  struct Codes {
    uint4 words[2];
    __device__ __forceinline__ Codes(const unsigned char* codes) {
      const uint4* own = reinterpret_cast<const uint4*>(codes);
      words[0] = own[0], words[1] = own[32];
    }
    __device__ __forceinline__ void fragment(uint32_t (&to)[4], int step, const Row&) const {
      const uint4 four = words[step / 2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t word = step % 2 ? (j < 2 ? four.z : four.w) : (j < 2 ? four.x : four.y);
        to[j] = small_floats<T, E4M3>(word >> (j % 2 * 8));
      }
    }
  };
};

}  // namespace cuda_ops
