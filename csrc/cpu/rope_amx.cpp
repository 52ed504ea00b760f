// Rotation of bfloat16: as elementwise_kernel.cpp, in a third of the instructions.

#include "amx_math.h"
#include "elementwise.h"

namespace cpu_ops {
namespace amx {
namespace {

inline Pair product(Pair a, Pair b) {
  return rounded({_mm512_mul_ps(a.even, b.even), _mm512_mul_ps(a.odd, b.odd)});
}
inline Pair sum(Pair a, Pair b) { return {_mm512_add_ps(a.even, b.even), _mm512_add_ps(a.odd, b.odd)}; }
inline Pair difference(Pair a, Pair b) { return {_mm512_sub_ps(a.even, b.even), _mm512_sub_ps(a.odd, b.odd)}; }

}  // namespace

void rope(const Rotation& rotation, int64_t first, int64_t last) {
  const int64_t half = rotation.half;
  for (int64_t token = first; token < last; ++token) {
    const char* cos = static_cast<const char*>(rotation.cos_sin) + rotation.positions[token] * 2 * half * 2;
    char* const heads = static_cast<char*>(rotation.x) + token * rotation.token_stride * 2;
    for (int64_t i = 0; i < half; i += 32) {
      const __mmask32 mask = mask_of(half - i);
      const Pair c = load(cos + i * 2, mask), s = load(cos + (half + i) * 2, mask);
      for (int64_t head = 0; head < rotation.num_heads; ++head) {
        char *x = heads + (head * rotation.head_stride + i) * 2, *y = x + half * 2;
        const Pair a = load(x, mask), b = load(y, mask);
        store(x, mask, difference(product(a, c), product(b, s)));
        store(y, mask, sum(product(b, c), product(a, s)));
      }
    }
  }
}

}  // namespace amx
}  // namespace cpu_ops
