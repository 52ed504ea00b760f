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
  x = sum_of_warp(x);
  if (warps_of_row == 1) return x;
  const int thread = threadIdx.x;
  if (thread % 32 == 0) slots[thread / 32] = x;
  __syncthreads();
  x = 0.0f;
  for (int i = 0; i < warps_of_row; ++i) x += slots[i];
  return x;
}

// The values' sum, rounded to T; its squares are added to `squares`.
template <class T, int V>
__device__ __forceinline__ Vector<T, V> add_vectors(Vector<T, V> a, const Vector<T, V>& b, float& squares) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    a.v[j] = from_float<T>(add(to_float(a.v[j]), to_float(b.v[j])));
    squares += to_float(a.v[j]) * to_float(a.v[j]);
  }
  return a;
}

// What a row is multiplied by, of the squares that its threads have.
__device__ __forceinline__ float norm_scale(float squares, float* slots, int warps_of_row, int size, float eps) {
  const float mean = sum_of_row(squares, slots, warps_of_row) / size;
  return 1.0f / sqrtf(mean + eps);
}

template <class T, int V>
__device__ __forceinline__ Vector<T, V> normed(Vector<T, V> a, const Vector<T, V>& weight, float scale, float offset) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float value = to_float(a.v[j]) * scale, w = to_float(weight.v[j]);
    a.v[j] = offset != 0.0f ? from_float<T>(value * (offset + w))
                            : from_float<T>(w * to_float(from_float<T>(value)));
  }
  return a;
}

constexpr int kShortRow = 1024;  // values that one warp takes
inline int threads_of_row(int64_t size) { return size <= kShortRow ? 32 : 256; }

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
    const Vector<T, V> a = load<T, V>(x + i);
    if (p.residual) {
      const Vector<T, V> sum = add_vectors(a, load<T, V>(p.residual + begin + i), squares);
      if (own) store<T, V>(p.total + begin + i, sum);
      continue;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) squares += to_float(a.v[j]) * to_float(a.v[j]);
  }
  const float scale = norm_scale(squares, slots, blockDim.x / 32, p.size, p.eps);
  if (!own) return;
  const T* from = p.residual ? p.total + begin : x;
  for (int i = threadIdx.x * V; i < p.size; i += step)
    store<T, V>(p.out + begin + i, normed(load<T, V>(from + i), load<T, V>(p.weight + i), scale, p.weight_offset));
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

// The activation is rounded to T before it multiplies, but for swiglu_oai.
template <class T, int V>
__device__ __forceinline__ Vector<T, V> gated(Vector<T, V> gate, const Vector<T, V>& up, Activation name) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float x = to_float(gate.v[j]), by = to_float(up.v[j]);
    gate.v[j] = from_float<T>(name == Activation::swiglu_oai ? swiglu_oai(x, by)
                                                             : to_float(from_float<T>(activate(x, name))) * by);
  }
  return gate;
}

// Grid: (pieces of a row, rows). Threads: 256. Moves 3 * size values a row.
template <class T, int V> __global__ void __launch_bounds__(256) gate_kernel(GateParams<T> p) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * V;
  if (i >= p.size) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const T* gate = p.gate_up + row * p.row_stride + i;
    store<T, V>(p.out + row * p.size + i, gated(load<T, V>(gate), load<T, V>(gate + p.size), p.name));
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
