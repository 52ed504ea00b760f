// Products with weights in panels (panels.h); compiled once for each instruction set. Every output is one sum over its
// inputs in their order, by blocks of kPanelInputs: its bits do not depend on how many rows there are, or which.

#include "panels.h"

#include "elementwise_vector.h"

namespace cpu_ops {
namespace ISA {
namespace {

constexpr int kVectors = 2;                    // of outputs, side by side
constexpr int kMostRows = W == 16 ? 12 : 6;    // times kVectors sums fit the registers, with what they are made of
constexpr int64_t kWidth = kVectors * W;

// Sums of R rows by kWidth outputs, as float32 in sums[R][kWidth].
template <Type type, int R> void sum_tile(const float* x, int64_t stride, const char* weight, int64_t k, float* sums) {
  for (int64_t from = 0; from < k; from += kPanelInputs) {
    const int64_t end = k - from < kPanelInputs ? k : from + kPanelInputs;
    Float part[R][kVectors] = {};
    for (int64_t i = from; i < end; ++i) {
      const char* at = weight + i * kPanelOutputs * kBytes<type>;
      const Float first = load_wide<type>(at), second = load_wide<type>(at + W * kBytes<type>);
      for (int r = 0; r < R; ++r) {
        const float value = x[r * stride + i];
        part[r][0] += value * first;
        part[r][1] += value * second;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) {
        float* to = sums + r * kWidth + v * W;
        store(to, from ? load<Float>(to) + part[r][v] : part[r][v]);
      }
  }
}

template <Type type, int R> void multiply_tile(const Panels& what, int64_t row, int64_t first_output) {
  alignas(64) float sums[R * kWidth] = {};
  const int64_t panel = first_output / kPanelOutputs, within = first_output % kPanelOutputs;
  const char* weight = static_cast<const char*>(what.weight) + (panel * what.k * kPanelOutputs + within) * kBytes<type>;
  sum_tile<type, R>(what.x + row * what.x_stride, what.x_stride, weight, what.k, sums);
  for (int v = 0; v < kVectors; ++v) {
    const int64_t output = first_output + v * W, left = what.n - output;
    if (left <= 0) return;
    const Float bias = what.bias ? load_some<type>(static_cast<const char*>(what.bias) + output * kBytes<type>, left) : Float{};
    for (int r = 0; r < R; ++r)
      store_some<type>(static_cast<char*>(what.out) + ((row + r) * what.n + output) * kBytes<type>,
                       load<Float>(sums + r * kWidth + v * W) + bias, left);
  }
}

template <Type type, int R> void multiply_rest(const Panels& what, int64_t row, int64_t output) {
  if constexpr (R > 0) {
    if (what.rows - row == R) multiply_tile<type, R>(what, row, output);
    else multiply_rest<type, R - 1>(what, row, output);
  }
}

template <Type type> void multiply(const Panels& what, int64_t first, int64_t last) {
  for (int64_t output = first * kPanelOutputs; output < last * kPanelOutputs && output < what.n; output += kWidth) {
    int64_t row = 0;
    for (; row + kMostRows <= what.rows; row += kMostRows) multiply_tile<type, kMostRows>(what, row, output);
    multiply_rest<type, kMostRows - 1>(what, row, output);
  }
}

template <Type type> void widen(const void* from, int64_t stride, int64_t rows, int64_t size, float* to) {
  for (int64_t r = 0; r < rows; ++r)
    widen_row<type>(to + r * size, static_cast<const char*>(from) + r * stride * kBytes<type>, static_cast<int>(size));
}

}  // namespace

void multiply_panels(const Panels& what, int64_t first, int64_t last) {
  switch (what.type) {
    case Type::f32: return multiply<Type::f32>(what, first, last);
    case Type::f16: return multiply<Type::f16>(what, first, last);
    case Type::bf16: return multiply<Type::bf16>(what, first, last);
  }
}

void widen_rows(Type type, const void* from, int64_t stride, int64_t rows, int64_t size, float* to) {
  switch (type) {
    case Type::f32: return widen<Type::f32>(from, stride, rows, size, to);
    case Type::f16: return widen<Type::f16>(from, stride, rows, size, to);
    case Type::bf16: return widen<Type::bf16>(from, stride, rows, size, to);
  }
}

}  // namespace ISA
}  // namespace cpu_ops
