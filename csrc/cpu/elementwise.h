// The ops between products that touch every value once, as elementwise.cpp calls their kernels: one call a run of rows.
#pragma once

#include <stdint.h>

#include "attention.h"

namespace cpu_ops {

struct Norm {
  Type type;
  int64_t size, x_stride, residual_stride;  // in values
  const void* x;
  const void* residual;  // null: none is added
  const void* weight;
  const void* bias;      // layer norm's
  void* total;           // x + residual, contiguous; read only if residual is
  void* out;             // contiguous
  float eps, weight_offset;
};

struct Rotation {
  Type type;
  int64_t num_heads, token_stride, head_stride, half;
  void* x;
  const int64_t* positions;
  const void* cos_sin;   // [max_position, 2 half], contiguous
};

#define CPU_OPS_ELEMENTWISE(isa)                               \
  namespace isa {                                              \
  void rms_norm(const Norm&, int64_t first, int64_t last);     \
  void layer_norm(const Norm&, int64_t first, int64_t last);   \
  void rope(const Rotation&, int64_t first, int64_t last);     \
  }
CPU_OPS_ELEMENTWISE(avx512)
CPU_OPS_ELEMENTWISE(avx2)
CPU_OPS_ELEMENTWISE(baseline)
#undef CPU_OPS_ELEMENTWISE
namespace amx {  // bfloat16
void rms_norm(const Norm&, int64_t first, int64_t last);
void layer_norm(const Norm&, int64_t first, int64_t last);
void rope(const Rotation&, int64_t first, int64_t last);
}  // namespace amx

}  // namespace cpu_ops
