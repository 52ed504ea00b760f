// Activations of bfloat16: as activation_kernel.cpp, which takes three times as many instructions.

#include "activation_amx.h"

namespace cpu_ops {
namespace amx {
namespace {

template <Activation kind> inline Pair activated(Pair x) { return {amx::activated<kind>(x.even), amx::activated<kind>(x.odd)}; }
inline Pair product(Pair x, Pair y) { return {_mm512_mul_ps(x.even, y.even), _mm512_mul_ps(x.odd, y.odd)}; }

template <Activation kind, bool gated> void activate_rows(const Activate& what, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const char* from = static_cast<const char*>(what.x) + row * what.x_stride * 2;
    char* out = static_cast<char*>(what.out) + row * what.out_stride * 2;
    for (int64_t i = 0; i < what.size; i += 32) {
      const __mmask32 mask = mask_of(what.size - i);
      const Pair x = load(from + i * 2, mask);
      if constexpr (!gated) {
        store(out + i * 2, mask, activated<kind>(x));
        continue;
      }
      const Pair up = load(from + (what.size + i) * 2, mask);
      if constexpr (kind == Activation::swiglu_oai)
        store(out + i * 2, mask, {swiglu_oai(x.even, up.even), swiglu_oai(x.odd, up.odd)});
      else store(out + i * 2, mask, product(rounded(activated<kind>(x)), up));
    }
  }
}

template <bool gated> void activate_kind(const Activate& what, int64_t first, int64_t last) {
  switch (what.kind) {
    case Activation::silu: return activate_rows<Activation::silu, gated>(what, first, last);
    case Activation::gelu: return activate_rows<Activation::gelu, gated>(what, first, last);
    case Activation::gelu_tanh: return activate_rows<Activation::gelu_tanh, gated>(what, first, last);
    case Activation::relu: return activate_rows<Activation::relu, gated>(what, first, last);
    case Activation::swiglu_oai: return activate_rows<Activation::swiglu_oai, true>(what, first, last);
  }
}

}  // namespace

void activate(const Activate& what, int64_t first, int64_t last) {
  return what.gated ? activate_kind<true>(what, first, last) : activate_kind<false>(what, first, last);
}

}  // namespace amx
}  // namespace cpu_ops
