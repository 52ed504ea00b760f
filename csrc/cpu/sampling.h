// What the op argmax (sampling.cpp) and its kernels say to each other.
#pragma once

#include <stdint.h>

#include "attention.h"

namespace cpu_ops {

struct Rows2d {
  Type type;
  int64_t size, stride;  // values of a row, and from one row to the next
  const void* x;
  float* best;     // [rows]; NaN where a value is
  int64_t* index;  // [rows] of the first among equal maxima, or of the first NaN
};

namespace avx512 { void argmax(const Rows2d& rows, int64_t first, int64_t last); }
namespace avx2 { void argmax(const Rows2d& rows, int64_t first, int64_t last); }
namespace baseline { void argmax(const Rows2d& rows, int64_t first, int64_t last); }

}  // namespace cpu_ops
