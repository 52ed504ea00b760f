// Memory for a kernel's scratch, aligned to 64 bytes.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace cpu_ops {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

inline Buffer floats(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
  Buffer buffer(static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))));
  STD_TORCH_CHECK(buffer != nullptr, "out of memory");
  return buffer;
}

}  // namespace cpu_ops
