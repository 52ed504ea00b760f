// Inputs of products rounded to 8 bits.
#pragma once

#include <primitives.cuh>

#include <cmath>

namespace cuda_ops {

constexpr int kQuantizeThreads = 256;

struct QuantizeParams {
  const void* x;              // [rows, in_features], rows at x_stride; addresses of rows and in_features: of 8 values
  const float* static_scale;  // one for all rows, or null: each row's own
  unsigned char* codes;       // [rows, padded_in], zeros past in_features; padded_in: a multiple of 8
  float* scales;              // [rows]; unused with static_scale
  int64_t x_stride;
  int in_features, padded_in;
  int scales_stride;  // of tiles
};

template <class T> struct alignas(16) Eight { T v[8]; };

// The larger of two magnitudes, NaN if one is.
__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }

// Half to even, within -128 and 127, as engines/ops/linear.py: quantize_input.
__device__ __forceinline__ unsigned char int8_of(float x) {
  return static_cast<unsigned char>(static_cast<int>(fminf(fmaxf(rintf(x), -128.0f), 127.0f)));
}

constexpr float kLeastScale = 1.17549435e-38f;  // the least normal float

template <class T> __device__ __forceinline__ uint2 int8_codes(const Eight<T>& x, float scale) {
  uint32_t words[2] = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) words[j / 4] |= static_cast<uint32_t>(int8_of(to_float(x.v[j]) / scale)) << j % 4 * 8;
  return uint2{words[0], words[1]};
}

template <class T> __device__ __forceinline__ uint2 e4m3_codes(const Eight<T>& x, float scale) {
  uint32_t words[2] = {};
#pragma unroll
  for (int j = 0; j < 8; j += 2)
    words[j / 4] |= pack_e4m3(to_float(x.v[j]) / scale, to_float(x.v[j + 1]) / scale) << j % 4 * 8;
  return uint2{words[0], words[1]};
}

// Grid: rows. Threads: 256. Shared memory: a float a warp. A row's scale is its largest magnitude / 127, or / 448 for E4M3. Moves the inputs
// once, the second reading comes out of the first-level cache.
template <class T, bool E4M3> __global__ void __launch_bounds__(kQuantizeThreads) quantize_rows_kernel(QuantizeParams p) {
  float* slots = reinterpret_cast<float*>(shared_memory());
  const int64_t row = blockIdx.x;
  const Eight<T>* x = reinterpret_cast<const Eight<T>*>(static_cast<const T*>(p.x) + row * p.x_stride);
  float scale;
  if (p.static_scale) {
    scale = *p.static_scale;
  } else {
    float most = 0.0f;
    for (int i = threadIdx.x; i < p.in_features / 8; i += kQuantizeThreads) {
      const Eight<T> own = x[i];
#pragma unroll
      for (int j = 0; j < 8; ++j) most = larger(most, fabsf(to_float(own.v[j])));
    }
#pragma unroll
    for (int by = 16; by; by /= 2) most = larger(most, __shfl_xor_sync(~0u, most, by));
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = most;
    __syncthreads();
    for (int i = 0; i < kQuantizeThreads / 32; ++i) most = larger(most, slots[i]);
    scale = larger(kLeastScale, most / (E4M3 ? 448.0f : 127.0f));
    if (threadIdx.x == 0) p.scales[row] = scale;
  }
  unsigned char* codes = p.codes + row * p.padded_in;
  for (int i = threadIdx.x; i < p.padded_in / 8; i += kQuantizeThreads) {
    Eight<T> own{};
    if (i < p.in_features / 8) own = x[i];
    reinterpret_cast<uint2*>(codes)[i] = E4M3 ? e4m3_codes(own, scale) : int8_codes(own, scale);
  }
}

// Grid: rows. Threads: 256. As above for E4M3 with a scale of each 128 columns, of which in_features is a multiple: 16
// threads have one tile. scales: [in_features / 128, scales_stride], a row's at its index.
template <class T> __global__ void __launch_bounds__(kQuantizeThreads) quantize_tiles_kernel(QuantizeParams p) {
  const int64_t row = blockIdx.x;
  const Eight<T>* x = reinterpret_cast<const Eight<T>*>(static_cast<const T*>(p.x) + row * p.x_stride);
  uint2* codes = reinterpret_cast<uint2*>(p.codes + row * p.padded_in);
  const int lane = threadIdx.x % 32, pieces = p.in_features / 8;
  for (int first = threadIdx.x - lane; first < pieces; first += kQuantizeThreads) {
    const int i = first + lane;
    Eight<T> own{};
    if (i < pieces) own = x[i];
    float most = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) most = larger(most, fabsf(to_float(own.v[j])));
#pragma unroll
    for (int by = 8; by; by /= 2) most = larger(most, __shfl_xor_sync(~0u, most, by));
    const float scale = p.static_scale ? *p.static_scale : larger(kLeastScale, most / 448.0f);
    if (i >= pieces) continue;
    codes[i] = e4m3_codes(own, scale);
    if (i % 16 == 0) p.scales[i / 16 * p.scales_stride + row] = scale;
  }
}

}  // namespace cuda_ops
