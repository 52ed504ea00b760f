// What the ops argmax and log_softmax_gather (sampling.cpp) and their kernels say to each other.
#pragma once

#include <stdint.h>

#include "attention.h"

namespace cpu_ops {

struct Logits {
  Type type;
  int64_t size, stride;  // values of a row, and from one row to the next
  const void* x;
};

struct Argmax {
  Logits logits;
  float* best;     // [rows]; NaN where a value is
  int64_t* index;  // [rows] of the first among equal maxima, or of the first NaN
};

struct LogSoftmaxGather {
  Logits logits;
  const int64_t* targets;  // [rows]
  float* out;              // [rows]; NaN where a value is
};

#define CPU_OPS_SAMPLING(isa)                                                  \
  namespace isa {                                                              \
  void argmax(const Argmax&, int64_t first, int64_t last);                     \
  void log_softmax_gather(const LogSoftmaxGather&, int64_t first, int64_t last); \
  }
CPU_OPS_SAMPLING(avx512)
CPU_OPS_SAMPLING(avx2)
CPU_OPS_SAMPLING(baseline)
#undef CPU_OPS_SAMPLING

}  // namespace cpu_ops
