// Rows to 8-bit integers and back, as quantize.cpp calls their kernels: one call a run of rows.
#pragma once

#include <stdint.h>

#include "attention.h"

namespace cpu_ops {

struct Quantize {
  Type type;
  int64_t size, x_stride;  // in values
  const void* x;
  const float* given;      // one scale for all rows; null: each row has its own
  int8_t* codes;           // contiguous
  float* scales;           // one a row
};

struct Rescale {
  Type type;               // of bias and out
  int64_t size;
  const float* sums;       // contiguous
  const float* scales;     // one a row
  const void* bias;        // null: none
  void* out;               // contiguous
};

#define CPU_OPS_QUANTIZE(isa)                                      \
  namespace isa {                                                  \
  void quantize_rows(const Quantize&, int64_t first, int64_t last); \
  void rescale_rows(const Rescale&, int64_t first, int64_t last);  \
  }
CPU_OPS_QUANTIZE(avx512)
CPU_OPS_QUANTIZE(avx2)
CPU_OPS_QUANTIZE(baseline)
#undef CPU_OPS_QUANTIZE

}  // namespace cpu_ops
