// The maximum of each row and where it is; compiled once for each instruction set.

#include "sampling.h"

#include "attention_vector.h"

namespace cpu_ops {
namespace ISA {
namespace {

// Each lane keeps its own maximum and the step at which it came: of equal values the first stays.
template <Type type> void argmax_rows(const Rows2d& rows, int64_t first, int64_t last) {
  constexpr int bytes = kBytes<type>;
  for (int64_t row = first; row < last; ++row) {
    const char* x = static_cast<const char*>(rows.x) + row * rows.stride * bytes;
    Float most = all(kNone);
    Int step = Int{} - 1, now = Int{}, nan = Int{};
    int64_t i = 0;
    for (; i + W <= rows.size; i += W, now += 1) {
      const Float value = load_wide<type>(x + i * bytes);
      const Int more = value > most;
      most = more ? value : most;
      step = more ? now : step;
      nan |= value != value;
    }
    float best = kNone;
    int64_t index = 0;
    bool is_nan = false;
    const auto take = [&](float value, int64_t at) {
      if (value > best || (value == best && at < index)) {
        best = value;
        index = at;
      }
    };
    for (int lane = 0; lane < W; ++lane) {
      is_nan |= nan[lane] != 0;
      if (step[lane] >= 0) take(most[lane], static_cast<int64_t>(step[lane]) * W + lane);
    }
    for (; i < rows.size; ++i) {
      char room[W * 4] = {};
      __builtin_memcpy(room, x + i * bytes, bytes);
      const float value = load_wide<type>(room)[0];
      is_nan |= value != value;
      take(value, i);
    }
    if (is_nan) {
      best = __builtin_nanf("");
      for (index = 0;; ++index) {
        char room[W * 4] = {};
        __builtin_memcpy(room, x + index * bytes, bytes);
        const float value = load_wide<type>(room)[0];
        if (value != value) break;
      }
    }
    rows.best[row] = best;
    rows.index[row] = index;
  }
}

}  // namespace

void argmax(const Rows2d& rows, int64_t first, int64_t last) {
  switch (rows.type) {
    case Type::f32: return argmax_rows<Type::f32>(rows, first, last);
    case Type::f16: return argmax_rows<Type::f16>(rows, first, last);
    case Type::bf16: return argmax_rows<Type::bf16>(rows, first, last);
  }
}

}  // namespace ISA
}  // namespace cpu_ops
