#include "isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace cpu_ops {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa best() {
#if defined(CPU_OPS_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const char* wanted = std::getenv("CPU_OPS_ISA");
  if (wanted == nullptr || *wanted == '\0') return best();
  for (int i = 0; i <= static_cast<int>(best()); ++i)
    if (std::string(wanted) == kNames[i]) return static_cast<Isa>(i);
  STD_TORCH_CHECK(false, "CPU_OPS_ISA: ", wanted, "; expected baseline, avx2 or avx512, and at most ",
                  kNames[static_cast<int>(best())], " on this machine; unset it for the best one");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

}  // namespace cpu_ops
