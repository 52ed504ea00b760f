// The maximum of each row and where it is, the log-probability of one of its values; compiled once for each
// instruction set.

#include "sampling.h"

#include "elementwise_vector.h"

namespace cpu_ops {
namespace ISA {
namespace {

// Each lane keeps its own maximum and the step at which it came: of equal values the first stays.
template <Type type> void argmax_rows(const Argmax& rows, int64_t first, int64_t last) {
  constexpr int bytes = kBytes<type>;
  const int64_t size = rows.logits.size;
  for (int64_t row = first; row < last; ++row) {
    const char* x = static_cast<const char*>(rows.logits.x) + row * rows.logits.stride * bytes;
    Float most = all(kNone);
    Int step = Int{} - 1, now = Int{}, nan = Int{};
    int64_t i = 0;
    for (; i + W <= size; i += W, now += 1) {
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
    for (; i < size; ++i) {
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

// `count` values from `from` on; the lanes past them are -inf, which weighs nothing.
template <Type type> inline Float load_logits(const char* from, int64_t count) {
  const Float x = load_some<type>(from, count);
  if (count >= W) return x;
  return lanes() < static_cast<int32_t>(count) ? x : all(kNone);
}

template <Type type> void log_softmax_gather_rows(const LogSoftmaxGather& rows, int64_t first, int64_t last) {
  constexpr int bytes = kBytes<type>;
  constexpr int64_t kRun = 64 * W;  // values that are summed in float32: more lose digits
  const int64_t size = rows.logits.size;
  for (int64_t row = first; row < last; ++row) {
    const char* x = static_cast<const char*>(rows.logits.x) + row * rows.logits.stride * bytes;
    Float most = all(kNone);
    Int nan = Int{};
    for (int64_t i = 0; i < size; i += W) {
      const Float value = load_logits<type>(x + i * bytes, size - i);
      most = max(value, most);
      nan |= value != value;
    }
    const float highest = ISA::highest(most), target = load_some<type>(x + rows.targets[row] * bytes, 1)[0];
    bool is_nan = false;
    for (int lane = 0; lane < W; ++lane) is_nan |= nan[lane] != 0;
    // No number, or infinity less infinity.
    if (is_nan || highest == kNone || highest == -kNone) {
      rows.out[row] = is_nan || highest == kNone || target == -kNone ? __builtin_nanf("") : kNone;
      continue;
    }
    double sum = 0.0;
    for (int64_t begin = 0; begin < size; begin += kRun) {
      Float part = Float{};
      for (int64_t i = begin; i < size && i < begin + kRun; i += W)
        part += exp(load_logits<type>(x + i * bytes, size - i) - highest);
      sum += static_cast<double>(ISA::total(part));
    }
    rows.out[row] = static_cast<float>(static_cast<double>(target) - highest - __builtin_log(sum));
  }
}

}  // namespace

#define CPU_OPS_BY_TYPE(op, rows, Params)                            \
  void op(const Params& params, int64_t first, int64_t last) {       \
    switch (params.logits.type) {                                    \
      case Type::f32: return rows<Type::f32>(params, first, last);   \
      case Type::f16: return rows<Type::f16>(params, first, last);   \
      case Type::bf16: return rows<Type::bf16>(params, first, last); \
    }                                                                \
  }
CPU_OPS_BY_TYPE(argmax, argmax_rows, Argmax)
CPU_OPS_BY_TYPE(log_softmax_gather, log_softmax_gather_rows, LogSoftmaxGather)
#undef CPU_OPS_BY_TYPE

}  // namespace ISA
}  // namespace cpu_ops
