// Plain and gated activations; compiled once for each instruction set. Rounding is the reference's:
// engines/ops/activation.py.

#include "activation.h"

#include "elementwise_vector.h"

namespace cpu_ops {
namespace ISA {
namespace {

// x / (1 + e^-y)
inline Float gate(Float x, Float y) { return x / (1.0f + exp(-y)); }

inline Float erf(Float x) {
  const Float z = min(max(x, all(-kErfBound)), all(kErfBound)), z2 = z * z;
  Float p = all(kErfP[0]), q = all(kErfQ[0]);
  for (int i = 1; i < 7; ++i) p = p * z2 + kErfP[i];
  for (int i = 1; i < 5; ++i) q = q * z2 + kErfQ[i];
  const Float inside = z * p / q;
  return x >= kErfBound ? all(1.0f) : x <= -kErfBound ? all(-1.0f) : inside;
}

template <Activation kind> inline Float activated(Float x) {
  if constexpr (kind == Activation::silu) return gate(x, x);
  else if constexpr (kind == Activation::gelu) return x * 0.5f * (1.0f + erf(x * kSqrtHalf));
  else if constexpr (kind == Activation::gelu_tanh)  // (1 + tanh(u)) / 2 is the logistic function of 2u
    return gate(x, 2.0f * kSqrt2OverPi * (x + kGeluCubic * x * x * x));
  else return x < 0.0f ? Float{} : x;
}

template <Type type, Activation kind, bool gated> void activate_rows(const Activate& what, int64_t first, int64_t last) {
  constexpr int bytes = kBytes<type>;
  for (int64_t row = first; row < last; ++row) {
    const char* from = static_cast<const char*>(what.x) + row * what.x_stride * bytes;
    char* out = static_cast<char*>(what.out) + row * what.out_stride * bytes;
    for (int64_t i = 0; i < what.size; i += W) {
      const int64_t left = what.size - i;
      const Float x = load_some<type>(from + i * bytes, left);
      if constexpr (!gated) {
        store_some<type>(out + i * bytes, activated<kind>(x), left);
        continue;
      }
      const Float up = load_some<type>(from + (what.size + i) * bytes, left);
      if constexpr (kind == Activation::swiglu_oai) {
        const Float most = all(kOaiLimit), g = x > most ? most : x, u = up > most ? most : up < -most ? -most : up;
        store_some<type>(out + i * bytes, gate(g, kOaiAlpha * g) * (u + 1.0f), left);
      } else {
        store_some<type>(out + i * bytes, rounded<type>(activated<kind>(x)) * up, left);
      }
    }
  }
}

template <Type type, bool gated> void activate_kind(const Activate& what, int64_t first, int64_t last) {
  switch (what.kind) {
    case Activation::silu: return activate_rows<type, Activation::silu, gated>(what, first, last);
    case Activation::gelu: return activate_rows<type, Activation::gelu, gated>(what, first, last);
    case Activation::gelu_tanh: return activate_rows<type, Activation::gelu_tanh, gated>(what, first, last);
    case Activation::relu: return activate_rows<type, Activation::relu, gated>(what, first, last);
    case Activation::swiglu_oai: return activate_rows<type, Activation::swiglu_oai, true>(what, first, last);
  }
}

template <Type type> void activate_type(const Activate& what, int64_t first, int64_t last) {
  return what.gated ? activate_kind<type, true>(what, first, last) : activate_kind<type, false>(what, first, last);
}

}  // namespace

void activate(const Activate& what, int64_t first, int64_t last) {
  switch (what.type) {
    case Type::f32: return activate_type<Type::f32>(what, first, last);
    case Type::f16: return activate_type<Type::f16>(what, first, last);
    case Type::bf16: return activate_type<Type::bf16>(what, first, last);
  }
}

}  // namespace ISA
}  // namespace cpu_ops
