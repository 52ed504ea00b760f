// Kernels of the ops that touch every value once; compiled once for each instruction set. Rounding is the references':
// engines/ops/{norm,rotary}.py.

#include "elementwise.h"

#include "elementwise_vector.h"

namespace cpu_ops {
namespace ISA {
namespace {

template <Type type> void rms_norm_rows(const Norm& norm, int64_t first, int64_t last) {
  constexpr int bytes = kBytes<type>;
  const char* weight = static_cast<const char*>(norm.weight);
  for (int64_t row = first; row < last; ++row) {
    const char* x = static_cast<const char*>(norm.x) + row * norm.x_stride * bytes;
    char* out = static_cast<char*>(norm.out) + row * norm.size * bytes;
    if (norm.residual) {
      const char* residual = static_cast<const char*>(norm.residual) + row * norm.residual_stride * bytes;
      char* total = static_cast<char*>(norm.total) + row * norm.size * bytes;
      for (int64_t i = 0; i < norm.size; i += W) {
        const int64_t left = norm.size - i;
        store_some<type>(total + i * bytes,
                         load_some<type>(x + i * bytes, left) + load_some<type>(residual + i * bytes, left), left);
      }
      x = total;
    }
    Float squares = Float{};
    for (int64_t i = 0; i < norm.size; i += W) {
      const Float value = load_some<type>(x + i * bytes, norm.size - i);
      squares += value * value;
    }
    const float mean = ISA::total(squares) / static_cast<float>(norm.size);
    const float scale = 1.0f / __builtin_sqrtf(mean + norm.eps);
    for (int64_t i = 0; i < norm.size; i += W) {
      const int64_t left = norm.size - i;
      const Float normed = load_some<type>(x + i * bytes, left) * scale, w = load_some<type>(weight + i * bytes, left);
      const Float result = norm.weight_offset != 0.0f ? normed * (w + norm.weight_offset) : w * rounded<type>(normed);
      store_some<type>(out + i * bytes, result, left);
    }
  }
}

// Mean and variance in two passes over the row, which lies in the nearest cache: no difference of large squares.
template <Type type> void layer_norm_rows(const Norm& norm, int64_t first, int64_t last) {
  constexpr int bytes = kBytes<type>;
  const char *weight = static_cast<const char*>(norm.weight), *bias = static_cast<const char*>(norm.bias);
  const float size = static_cast<float>(norm.size);
  for (int64_t row = first; row < last; ++row) {
    const char* x = static_cast<const char*>(norm.x) + row * norm.x_stride * bytes;
    char* out = static_cast<char*>(norm.out) + row * norm.size * bytes;
    Float sum = Float{};
    if (norm.residual) {
      const char* residual = static_cast<const char*>(norm.residual) + row * norm.residual_stride * bytes;
      for (int64_t i = 0; i < norm.size; i += W) {
        const int64_t left = norm.size - i;
        const Float value =
            rounded<type>(load_some<type>(x + i * bytes, left) + load_some<type>(residual + i * bytes, left));
        sum += value;
        store_some<type>(out + i * bytes, value, left);
      }
      x = out;
    } else {
      for (int64_t i = 0; i < norm.size; i += W) sum += load_some<type>(x + i * bytes, norm.size - i);
    }
    const float mean = ISA::total(sum) / size;
    Float squares = Float{};
    for (int64_t i = 0; i < norm.size; i += W) {
      const int64_t left = norm.size - i;
      const Float value = load_some<type>(x + i * bytes, left) - mean;
      squares += left >= W ? value * value : only(value * value, left);
    }
    const float scale = 1.0f / __builtin_sqrtf(ISA::total(squares) / size + norm.eps);
    for (int64_t i = 0; i < norm.size; i += W) {
      const int64_t left = norm.size - i;
      const Float normed = (load_some<type>(x + i * bytes, left) - mean) * scale;
      const Float w = load_some<type>(weight + i * bytes, left), b = load_some<type>(bias + i * bytes, left);
      store_some<type>(out + i * bytes, normed * w + b, left);
    }
  }
}

template <Type type> void rope_rows(const Rotation& rotation, int64_t first, int64_t last) {
  constexpr int bytes = kBytes<type>;
  const int64_t half = rotation.half;
  for (int64_t token = first; token < last; ++token) {
    const char* cos = static_cast<const char*>(rotation.cos_sin) + rotation.positions[token] * 2 * half * bytes;
    const char* sin = cos + half * bytes;
    for (int64_t head = 0; head < rotation.num_heads; ++head) {
      char* x = static_cast<char*>(rotation.x) + (token * rotation.token_stride + head * rotation.head_stride) * bytes;
      char* y = x + half * bytes;
      for (int64_t i = 0; i < half; i += W) {
        const int64_t left = half - i;
        const Float c = load_some<type>(cos + i * bytes, left), s = load_some<type>(sin + i * bytes, left);
        const Float a = load_some<type>(x + i * bytes, left), b = load_some<type>(y + i * bytes, left);
        store_some<type>(x + i * bytes, rounded<type>(a * c) - rounded<type>(b * s), left);
        store_some<type>(y + i * bytes, rounded<type>(b * c) + rounded<type>(a * s), left);
      }
    }
  }
}

}  // namespace

#define CPU_OPS_BY_TYPE(op, rows, Params)                        \
  void op(const Params& params, int64_t first, int64_t last) {   \
    switch (params.type) {                                       \
      case Type::f32: return rows<Type::f32>(params, first, last);   \
      case Type::f16: return rows<Type::f16>(params, first, last);   \
      case Type::bf16: return rows<Type::bf16>(params, first, last); \
    }                                                            \
  }
CPU_OPS_BY_TYPE(rms_norm, rms_norm_rows, Norm)
CPU_OPS_BY_TYPE(layer_norm, layer_norm_rows, Norm)
CPU_OPS_BY_TYPE(rope, rope_rows, Rotation)
#undef CPU_OPS_BY_TYPE

}  // namespace ISA
}  // namespace cpu_ops
