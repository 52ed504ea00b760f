#include "isa.h"

#include <torch/headeronly/util/Exception.h>

#if defined(CPU_OPS_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <string>

// What engines/sources.py finds in the library's file; CPU_OPS_SOURCES is the digest that setup.py gives.
#define CPU_OPS_TEXT_OF(x) #x
#define CPU_OPS_TEXT(x) CPU_OPS_TEXT_OF(x)
extern "C" __attribute__((used, visibility("default"))) const char cpu_ops_sources[] =
    "cpu_ops sources " CPU_OPS_TEXT(CPU_OPS_SOURCES);

namespace cpu_ops {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "amx"};

#if defined(CPU_OPS_X86)
// Linux gives a process the tiles' state on request: Documentation/arch/x86/xstate.rst.
bool has_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & kAmxBf16) && (d & kAmxTile) && (d & kAmxInt8) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Isa best() {
#if defined(CPU_OPS_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return has_amx() ? Isa::amx : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const char* wanted = std::getenv("CPU_OPS_ISA");
  if (wanted == nullptr || *wanted == '\0') return best();
  for (int i = 0; i <= static_cast<int>(best()); ++i)
    if (std::string(wanted) == kNames[i]) return static_cast<Isa>(i);
  STD_TORCH_CHECK(false, "CPU_OPS_ISA: ", wanted, "; expected baseline, avx2, avx512 or amx, and at most ",
                  kNames[static_cast<int>(best())], " on this machine; unset it for the best one");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace cpu_ops
