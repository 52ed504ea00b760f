// Rows of values that need not fill vectors, and rounding as a store and a load would: for kernels of ops on rows.
#pragma once

#include "attention_vector.h"

namespace cpu_ops {
namespace ISA {
namespace {

// `count` values from `from` on, widened; the lanes past them are zero.
template <Type type> inline Float load_some(const char* from, int64_t count) {
  if (count >= W) return load_wide<type>(from);
  char values[W * 4] = {};
  __builtin_memcpy(values, from, count * kBytes<type>);
  return load_wide<type>(values);
}

// x as it is after a store in this type and a load.
template <Type type> inline Float rounded(Float x) {
  if constexpr (type == Type::f32) return x;
  else return widen<type>(narrow<type>(x));
}

// The first `count` lanes of x, zero in the others.
inline Float only(Float x, int64_t count) { return lanes() < static_cast<int32_t>(count) ? x : Float{}; }

}  // namespace
}  // namespace ISA
}  // namespace cpu_ops
