// Kernels that read and write each value about once, and so are as fast as the memory: rms_norm, add_rms_norm,
// act_and_mul, softcap. Contracts: engines/ops/{norm,activation}.py.
#pragma once

#include <cmath>

#include "vectors.cuh"

namespace cuda_ops {

// ---- norms ----

// Row r of x is row r % inner of group r / inner, so that heads of a wider projection need no copy.
template <class T> struct NormParams {
  const T* x;          // [rows, size]
  const T* residual;   // the same, dense; null: none
  const T* weight;     // [size]
  T* out;              // [rows, size], dense
  T* total;            // [rows, size], dense: x + residual; unused without residual
  int64_t rows, inner, outer_stride, inner_stride;
  int size;
  float eps, weight_offset;
};

// The sum over the threads of one row. `slots` holds a float for each warp of the block.
__device__ __forceinline__ float sum_of_row(float x, float* slots, int warps_of_row) {
#pragma unroll
  for (int by = 16; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
  if (warps_of_row == 1) return x;
  const int thread = threadIdx.x;
  if (thread % 32 == 0) slots[thread / 32] = x;
  __syncthreads();
  x = 0.0f;
  for (int i = 0; i < warps_of_row; ++i) x += slots[i];
  return x;
}

// Grid: rows / blockDim.y blocks. Threads: (x: of one row, a warp for short rows or 256, y: rows; more than one only
// when a row has one warp). Shared memory: a float a warp. Moves: x, residual, out, total once, the second reading of x
// or total comes out of the first-level cache.
template <class T, int V> __global__ void __launch_bounds__(256) norm_kernel(NormParams<T> p) {
  float* slots = reinterpret_cast<float*>(shared_memory());
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t at = row < p.rows ? row : p.rows - 1;  // threads past the end repeat the last row, for its shuffles
  const bool own = row < p.rows;
  const T* x = p.x + at / p.inner * p.outer_stride + at % p.inner * p.inner_stride;
  const int64_t begin = at * p.size;
  const int step = blockDim.x * V;
  float squares = 0.0f;
  for (int i = threadIdx.x * V; i < p.size; i += step) {
    Vector<T, V> a = load<T, V>(x + i);
    if (p.residual) {
      const Vector<T, V> b = load<T, V>(p.residual + begin + i);
#pragma unroll
      for (int j = 0; j < V; ++j) a.v[j] = from_float<T>(add(to_float(a.v[j]), to_float(b.v[j])));
      if (own) store<T, V>(p.total + begin + i, a);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) squares += to_float(a.v[j]) * to_float(a.v[j]);
  }
  const float mean = sum_of_row(squares, slots, blockDim.x / 32) / p.size;
  const float scale = 1.0f / sqrtf(mean + p.eps);
  if (!own) return;
  const T* from = p.residual ? p.total + begin : x;
  for (int i = threadIdx.x * V; i < p.size; i += step) {
    Vector<T, V> a = load<T, V>(from + i);
    const Vector<T, V> w = load<T, V>(p.weight + i);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float normed = to_float(a.v[j]) * scale, weight = to_float(w.v[j]);
      a.v[j] = p.weight_offset != 0.0f ? from_float<T>(normed * (p.weight_offset + weight))
                                       : from_float<T>(weight * to_float(from_float<T>(normed)));
    }
    store<T, V>(p.out + begin + i, a);
  }
}

// ---- gated activation ----

enum class Activation { silu, gelu, gelu_tanh, relu, swiglu_oai };

__device__ __forceinline__ float activate(float x, Activation name) {
  switch (name) {
    case Activation::silu: return x / (1.0f + expf(-x));
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::gelu_tanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    default: return x > 0.0f || x != x ? x : 0.0f;  // NaN stays NaN
  }
}

// gate * sigmoid(1.702 gate) * (up + 1), gate at most 7, up from -7 to 7; NaN stays NaN.
__device__ __forceinline__ float swiglu_oai(float gate, float up) {
  gate = gate > 7.0f ? 7.0f : gate;
  up = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
  return gate / (1.0f + expf(-1.702f * gate)) * (up + 1.0f);
}

template <class T> struct GateParams {
  const T* gate_up;  // [rows, 2 * size]
  T* out;            // [rows, size], dense
  int64_t rows, row_stride;
  int size;
  Activation name;
};

// Grid: (pieces of a row, rows). Threads: 256. Moves 3 * size values a row.
template <class T, int V> __global__ void __launch_bounds__(256) gate_kernel(GateParams<T> p) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * V;
  if (i >= p.size) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const T* gate = p.gate_up + row * p.row_stride + i;
    Vector<T, V> a = load<T, V>(gate);
    const Vector<T, V> b = load<T, V>(gate + p.size);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float x = to_float(a.v[j]), up = to_float(b.v[j]);
      const bool oai = p.name == Activation::swiglu_oai;
      a.v[j] = from_float<T>(oai ? swiglu_oai(x, up) : to_float(from_float<T>(activate(x, p.name))) * up);
    }
    store<T, V>(p.out + row * p.size + i, a);
  }
}

template <class T> struct SoftcapParams {
  const T* x;  // [size], dense, as out
  T* out;
  int64_t size;
  float cap;
};

// Grid: pieces. Threads: 256. Moves every value twice.
template <class T, int V> __global__ void __launch_bounds__(256) softcap_kernel(SoftcapParams<T> p) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (i >= p.size) return;
  Vector<T, V> a = load<T, V>(p.x + i);
#pragma unroll
  for (int j = 0; j < V; ++j) a.v[j] = from_float<T>(p.cap * tanhf(to_float(a.v[j]) / p.cap));
  store<T, V>(p.out + i, a);
}

}  // namespace cuda_ops
