// What the op activate (activation.cpp) and its kernels say to each other.
#pragma once

#include <stdint.h>

#include "attention.h"

namespace cpu_ops {

// As ACTIVATIONS of engines/cpu/compiled.py numbers them.
enum class Activation : int { silu, gelu, gelu_tanh, relu, swiglu_oai };

// out = act(x), or act(x[:, :size]) * x[:, size:]
struct Activate {
  Type type;
  Activation kind;
  bool gated;
  int64_t size, x_stride, out_stride;  // values of a result's row, and from one row to the next
  const void* x;
  void* out;  // may be x, if not gated
};

namespace amx { void activate(const Activate&, int64_t first, int64_t last); }  // bfloat16
namespace avx512 { void activate(const Activate&, int64_t first, int64_t last); }
namespace avx2 { void activate(const Activate&, int64_t first, int64_t last); }
namespace baseline { void activate(const Activate&, int64_t first, int64_t last); }

constexpr float kOaiAlpha = 1.702f, kOaiLimit = 7.0f;
constexpr float kSqrt2OverPi = 0.7978845608028654f, kGeluCubic = 0.044715f, kSqrtHalf = 0.7071067811865476f;

// erf(z) = z * p(z^2) / q(z^2) within 3 units of the last place, for |z| <= 4; 1 beyond. Highest power first.
// Source: generic_fast_erf_float of Eigen 3.4, unsupported/Eigen/src/SpecialFunctions/SpecialFunctionsImpl.h
// (also XLA's ErfImpl32).
constexpr float kErfBound = 4.0f;
constexpr float kErfP[] = {-2.72614225801306e-10f, 2.77068142495902e-08f,  -2.10102402082508e-06f, -5.69250639462346e-05f,
                           -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f};
constexpr float kErfQ[] = {-1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f,
                           -1.42647390514189e-02f};

}  // namespace cpu_ops
