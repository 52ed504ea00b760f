// What the op linear_panels (panels.cpp) and its kernel (panels_kernel.cpp) say to each other.
#pragma once

#include <stdint.h>

#include "attention.h"

namespace cpu_ops {

// A weight in panels is [ceil(n / 32)][k][32] values: 32 outputs side by side, zero past n.
constexpr int64_t kPanelOutputs = 32;
// Inputs whose products are added up from zero, before the sum of those before: errors grow with the longer of the two.
constexpr int64_t kPanelInputs = 64;

// out = x @ weight + bias, for the rows given.
struct Panels {
  Type type;  // of all but x
  int64_t rows, k, n, x_stride;  // of x in values
  const float* x;
  const void *weight, *bias;     // bias: null for none
  void* out;                     // [rows][n], contiguous
};

#define CPU_OPS_PANELS(isa)                                                          \
  namespace isa {                                                                    \
  void multiply_panels(const Panels&, int64_t first, int64_t last);                  \
  void widen_rows(Type, const void* from, int64_t stride, int64_t rows, int64_t size, float* to); \
  }
CPU_OPS_PANELS(avx512)
CPU_OPS_PANELS(avx2)
CPU_OPS_PANELS(baseline)
#undef CPU_OPS_PANELS

}  // namespace cpu_ops
