// Rows to 8-bit integers and back; compiled once for each instruction set. Rounding is the reference's:
// engines/ops/linear.py.

#include "quantize.h"

#include "elementwise_vector.h"

namespace cpu_ops {
namespace ISA {
namespace {

typedef int8_t Byte __attribute__((vector_size(W)));

constexpr float kTiny = 1.17549435e-38f;

template <Type type> void quantize(const Quantize& what, int64_t first, int64_t last) {
  constexpr int bytes = kBytes<type>;
  const Float shift = all(12582912.0f);  // 1.5 * 2^23: a sum with it is rounded to an integer, ties to even
  for (int64_t row = first; row < last; ++row) {
    const char* x = static_cast<const char*>(what.x) + row * what.x_stride * bytes;
    float scale = what.given ? *what.given : 0.0f;
    if (!what.given) {
      Float most = Float{};
      Int bad = Int{};
      for (int64_t i = 0; i < what.size; i += W) {
        const Float value = load_some<type>(x + i * bytes, what.size - i);
        most = max(most, max(value, -value));
        bad |= value != value;
      }
      float largest = 0.0f;
      bool sound = true;
      for (int lane = 0; lane < W; ++lane) {
        largest = most[lane] > largest ? most[lane] : largest;
        sound &= !bad[lane];
      }
      scale = largest / 127.0f;
      scale = !sound ? __builtin_nanf("") : scale < kTiny ? kTiny : scale;
    }
    what.scales[row] = scale;
    int8_t* codes = what.codes + row * what.size;
    for (int64_t i = 0; i < what.size; i += W) {
      const int64_t left = what.size - i;
      const Float value = load_some<type>(x + i * bytes, left) / scale;
      const Float bounded = min(max(value, all(-128.0f)), all(127.0f));
      const Byte code = __builtin_convertvector(bits<Int>(bounded + shift) - 0x4b400000, Byte);
      if (left >= W) store(codes + i, code);
      else __builtin_memcpy(codes + i, &code, left);
    }
  }
}

template <Type type> void rescale(const Rescale& what, int64_t first, int64_t last) {
  constexpr int bytes = kBytes<type>;
  const char* bias = static_cast<const char*>(what.bias);
  for (int64_t row = first; row < last; ++row) {
    const char* sums = reinterpret_cast<const char*>(what.sums + row * what.size);
    char* out = static_cast<char*>(what.out) + row * what.size * bytes;
    for (int64_t i = 0; i < what.size; i += W) {
      const int64_t left = what.size - i;
      Float value = load_some<Type::f32>(sums + i * kBytes<Type::f32>, left) * what.scales[row];
      if (bias) value += load_some<type>(bias + i * bytes, left);
      store_some<type>(out + i * bytes, value, left);
    }
  }
}

}  // namespace

void quantize_rows(const Quantize& what, int64_t first, int64_t last) {
  switch (what.type) {
    case Type::f32: return quantize<Type::f32>(what, first, last);
    case Type::f16: return quantize<Type::f16>(what, first, last);
    case Type::bf16: return quantize<Type::bf16>(what, first, last);
  }
}

void rescale_rows(const Rescale& what, int64_t first, int64_t last) {
  switch (what.type) {
    case Type::f32: return rescale<Type::f32>(what, first, last);
    case Type::f16: return rescale<Type::f16>(what, first, last);
    case Type::bf16: return rescale<Type::bf16>(what, first, last);
  }
}

}  // namespace ISA
}  // namespace cpu_ops
