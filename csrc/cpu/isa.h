// The instruction set that kernels run with, chosen once: the best one the processor has, or a lower one that the
// environment variable CPU_OPS_ISA names (amx, avx512, avx2, baseline).
#pragma once

namespace cpu_ops {

enum class Isa { baseline, avx2, avx512, amx };

// Throws when CPU_OPS_ISA names none of them, or one that this processor or this build lacks.
Isa isa();

}  // namespace cpu_ops
