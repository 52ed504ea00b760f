// Values that a thread moves at once, and what the lanes of a warp make of theirs together.
//
// V: values of a Vector, 16 bytes of them where addresses and sizes allow, else 1.
#pragma once

#include <primitives.cuh>

#include <cmath>

namespace cuda_ops {

template <class T, int V> struct alignas(sizeof(T) * V) Vector { T v[V]; };

template <class T, int V> __device__ __forceinline__ Vector<T, V> load(const T* from) {
  return *reinterpret_cast<const Vector<T, V>*>(from);
}
template <class T, int V> __device__ __forceinline__ void store(T* to, const Vector<T, V>& value) {
  *reinterpret_cast<Vector<T, V>*>(to) = value;
}

// The larger one; NaN if one of them is.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

// Over groups of as many neighbouring lanes, a power of two; all lanes of the warp call this.
__device__ __forceinline__ float largest_of_lanes(float x, int lanes) {
#pragma unroll
  for (int by = 16; by; by /= 2)
    if (by < lanes) x = larger(x, __shfl_xor_sync(~0u, x, by));
  return x;
}

// Over the warp; all its lanes call this.
template <class T> __device__ __forceinline__ T sum_of_warp(T x) {
#pragma unroll
  for (int by = 16; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
  return x;
}
__device__ __forceinline__ float max_of_warp(float x) {  // NaN is passed over
#pragma unroll
  for (int by = 16; by; by /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, by));
  return x;
}

}  // namespace cuda_ops
