// Floats of 4 and 8 bits as 16-bit ones.
#pragma once

#include <primitives.cuh>

namespace cuda_ops {

template <class T> struct Half;
template <> struct Half<bf16> { static constexpr int kMantissa = 7, kBias = 127; };
template <> struct Half<fp16> { static constexpr int kMantissa = 10, kBias = 15; };

struct E4M3 { static constexpr int kWidth = 8, kMantissa = 3, kBias = 7; };  // arXiv 2209.05433
struct E2M1 { static constexpr int kWidth = 4, kMantissa = 1, kBias = 1; };  // OCP MX specification 1.0, section 5.3.3

// Two codes, in the lowest bits of both halves of x, as numbers of T; other bits of x do not matter. Exact, subnormal
// numbers as well: a code at the upper end of T's mantissa is its value times a power of two, which is taken back. NaN of
// E4M3, which has no bits of its own there, becomes 480.
template <class T, class Small> __device__ __forceinline__ uint32_t small_floats(uint32_t x) {
  constexpr int kSign = Small::kWidth - 1;
  constexpr uint32_t kBoth = 0x00010001u, kValue = ((1u << kSign) - 1) * kBoth;
  constexpr uint32_t kPower = static_cast<uint32_t>(2 * Half<T>::kBias - Small::kBias) << Half<T>::kMantissa;
  const uint32_t bits = (x & kValue) << (Half<T>::kMantissa - Small::kMantissa) | (x & kBoth << kSign) << (15 - kSign);
  return multiply_pairs<T>(bits, kPower * kBoth);
}

}  // namespace cuda_ops
