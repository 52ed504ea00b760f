// Decoding over keys and values in 8 or 4 bits: codes go from shared memory to the tensor cores as numbers that are
// exact, scales and offsets are multiplied into scores and weights.
//
// With code - kCenter = c of a key or value, x = c * scale + middle, so
//   score = scale * (q . c) + middle * sum(q),  out = sum(weight * scale * c) + sum(weight * middle)
// The order of dimensions is free: that of a score's sum, if queries are loaded in it too, and that of an output's
// columns. So lanes read words of neighbouring codes.
#pragma once

#include "attention_decode.cuh"
#include "kv_codes.cuh"

namespace cuda_ops {

// UNIT codes in one load of at most 4 bytes, in the lowest bits.
template <int BYTES> __device__ __forceinline__ uint32_t load_codes(const unsigned char* from) {
  if constexpr (BYTES == 4) return *reinterpret_cast<const uint32_t*>(from);
  else if constexpr (BYTES == 2) return *reinterpret_cast<const uint16_t*>(from);
  else return *from;
}

template <class Value, int SIZE, Form FORM> struct CodedTile {
  using T = Value;
  using Pairs = CodePairs<T, FORM>;
  static constexpr int D = SIZE;
  static constexpr int kStages = 3;
  static constexpr bool kNibbles = FORM == Form::int4;
  static constexpr int kNumbers = kv_numbers(FORM), kWidth = kv_width(FORM, D);
  static constexpr int kPiece = kWidth % 16 ? 8 : 16;  // bytes of a copy
  static constexpr int kStride = kWidth + 16;          // bytes a row in shared memory
  static constexpr int kScales = 2 * 16 * kStride;     // where a stage's scales begin: 16 of keys, 16 of values
  static constexpr int kStageBytes = kScales + 2 * 16 * kNumbers * 4;
  // Neighbouring codes that a lane reads at once: of a key, and of a value.
  static constexpr int kKeyUnit = kNibbles && D % 32 == 0 ? 8 : 4;
  static constexpr int kValueUnit = kNibbles && D % 64 == 0 ? 8 : D % 32 == 0 ? 4 : 2;
  static constexpr int kKeyBytes = kNibbles ? kKeyUnit / 2 : kKeyUnit;
  static constexpr int kValueBytes = kNibbles ? kValueUnit / 2 : kValueUnit;

  // Of step k of a score's sum, the dimension of this lane's number i of 4: columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9.
  __device__ __forceinline__ static int key_dimension(int k, int i) {
    const int t = threadIdx.x % 4;
    if constexpr (!kNibbles) return 16 * k + 4 * t + i;
    else if constexpr (kKeyUnit == 8) return 32 * (k / 2) + 8 * t + 2 * (k % 2) + i / 2 + i % 2 * 4;
    else return 16 * k + 4 * t + i / 2 + i % 2 * 2;
  }
  // The same as pairs of codes, of the word that holds them.
  __device__ __forceinline__ static uint32_t key_pair(uint32_t word, int k, int half) {
    if constexpr (!kNibbles) return Pairs::make(select_bytes(word, 0, half ? 0x4342 : 0x4140));
    else if constexpr (kKeyUnit == 8) return Pairs::make(word >> 4 * (2 * (k % 2) + half));
    else return Pairs::make((word | word << 8) >> 4 * half);
  }
  // Which dimension column `i` of softmax.out[n] is.
  __device__ __forceinline__ static int dimension(int n, int i) {
    return n / kValueUnit * 8 * kValueUnit + i * kValueUnit + n % kValueUnit;
  }

  __device__ __forceinline__ CodedTile(const AttentionParams& p, const Sequence<T>& own, int row, int rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = row + 8 * i;
      const T* from = static_cast<const T*>(p.q) + (own.first_token + r / p.group) * p.q_token_stride +
                      (own.head * p.group + r % p.group) * p.q_head_stride;
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < D / 16; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float low = r < rows ? to_float(from[key_dimension(k, 2 * half)]) : 0.0f;
          const float high = r < rows ? to_float(from[key_dimension(k, 2 * half + 1)]) : 0.0f;
          queries[k][i + 2 * half] = pack<T>(low, high);
          sum += low + high;
        }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      query_sum[i] = sum;
      middle[i] = 0.0f;
    }
    unit = kSmallestScale;
    inverse = 1.0f / kSmallestScale;
  }

  // Starts the copy to a stage; codes and scales of rows outside [from, to) are zeros.
  __device__ __forceinline__ static void copy(unsigned char* stage, const AttentionParams& p, const Sequence<T>& own,
                                              int tile, int from, int to) {
    constexpr int kPieces = kWidth / kPiece;
    const int lane = threadIdx.x % 32, key = tile * 16 + lane % 16;
    const bool here = key >= from && key < to;
    const int64_t mine = here ? own.slot_at(p, key) : -1;
#pragma unroll
    for (int i = 0; i < (16 * kPieces + 31) / 32; ++i) {
      const int piece = i * 32 + lane, row = piece / kPieces, column = piece % kPieces * kPiece;
      const int64_t at = __shfl_sync(~0u, mine, row % 16);
      const bool valid = at >= 0;
      const int64_t offset = valid ? at * kWidth + column : 0;
      if (row >= 16) continue;
      const void* froms[2] = {static_cast<const unsigned char*>(p.k_cache) + offset,
                              static_cast<const unsigned char*>(p.v_cache) + offset};
#pragma unroll
      for (int what = 0; what < 2; ++what) {
        unsigned char* to_row = stage + (what * 16 + row) * kStride + column;
        if constexpr (kPiece == 16) copy_async(to_row, froms[what], valid);
        else copy_async_short<kPiece>(to_row, froms[what], valid);
      }
    }
    copy_async_short<kNumbers * 4>(stage + kScales + lane * kNumbers * 4,
                                   (lane < 16 ? p.k_scales : p.v_scales) + (here ? mine * kNumbers : 0), here);
  }

  struct Scale {
    float scale, middle;
  };
  // Of key or value `at` of a stage.
  __device__ __forceinline__ static Scale scale_at(const unsigned char* stage, int what, int at) {
    const float* from = reinterpret_cast<const float*>(stage + kScales) + (what * 16 + at) * kNumbers;
    if constexpr (FORM == Form::fp8) return {from[0] * Pairs::kUnit, 0.0f};
    else return {from[0], from[1] + from[0] * Pairs::kCenter};
  }

  __device__ __forceinline__ void multiply(float (&scores)[2][4], const unsigned char* stage) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
      const unsigned char* row = stage + (n * 8 + lane / 4) * kStride + lane % 4 * kKeyBytes;
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        const uint32_t word = load_codes<kKeyBytes>(row + k * 4 / kKeyUnit * (4 * kKeyBytes));
        multiply_add<T>(scores[n], queries[k], key_pair(word, k, 0), key_pair(word, k, 1));
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Scale by = scale_at(stage, 0, n * 8 + lane % 4 * 2 + j);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          scores[n][j + 2 * i] = by.scale * scores[n][j + 2 * i] + by.middle * query_sum[i];
      }
    }
  }

  // Takes scores of a stage's keys into the softmax, and their values. Weights times scales are kept over `unit`, the
  // largest scale so far, so that a float16 holds them.
  __device__ __forceinline__ void take(Softmax<D>& softmax, float (&scores)[2][4], const unsigned char* stage) {
    const int lane = threadIdx.x % 32;
    float factor[2];
    softmax.weigh(scores, factor);
    Scale by[2][2];
    float most = unit;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        by[n][j] = scale_at(stage, 1, n * 8 + lane % 4 * 2 + j);
        most = fmaxf(most, by[n][j].scale);
      }
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    float change = 1.0f;
    if (most != unit) {
      inverse = 1.0f / most;
      change = unit * inverse;
      unit = most;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      middle[i] *= factor[i];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& weight = scores[n][j + 2 * i];
          middle[i] += weight * by[n][j].middle;
          weight *= by[n][j].scale * inverse;
        }
      factor[i] *= change;
    }
    softmax.scale(factor);

    const uint32_t a[4] = {pack<T>(scores[0][0], scores[0][1]), pack<T>(scores[0][2], scores[0][3]),
                           pack<T>(scores[1][0], scores[1][1]), pack<T>(scores[1][2], scores[1][3])};
    const unsigned char* rows = stage + (16 + lane % 4 * 2) * kStride + lane / 4 * kValueBytes;
#pragma unroll
    for (int d = 0; d < D / (8 * kValueUnit); ++d) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        words[i] = load_codes<kValueBytes>(rows + (i / 2 * 8 + i % 2) * kStride + d * 8 * kValueBytes);
#pragma unroll
      for (int j = 0; j < kValueUnit; ++j)
        multiply_add<T>(softmax.out[d * kValueUnit + j], a, value_pair(words[0], words[1], j),
                        value_pair(words[2], words[3], j));
    }
  }

  // Code j of two words.
  __device__ __forceinline__ static uint32_t value_pair(uint32_t one, uint32_t two, int j) {
    if constexpr (kNibbles) return Pairs::make(select_bytes(one, two, j < 4 ? 0x5410 : 0x7632) >> 4 * (j % 4));
    else return Pairs::make(select_bytes(one, two, 0x4400 + 0x1111 * j));
  }

  __device__ __forceinline__ void finish(Softmax<D>& softmax) {
    softmax.finish();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      middle[i] += __shfl_xor_sync(~0u, middle[i], 1);
      middle[i] += __shfl_xor_sync(~0u, middle[i], 2);
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) softmax.out[n][i] = softmax.out[n][i] * unit + middle[i / 2];
  }

  uint32_t queries[D / 16][4];
  float query_sum[2], middle[2], unit, inverse;
};

}  // namespace cuda_ops
