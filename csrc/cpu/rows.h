// Ops on rows: which kernel runs, what is checked, and how rows are shared out among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "isa.h"

#if defined(CPU_OPS_X86)
#define CPU_OPS_PICK(op) (isa() >= Isa::avx512 ? avx512::op : isa() == Isa::avx2 ? avx2::op : baseline::op)
// Where there is one for bfloat16 on machines with AMX as well.
#define CPU_OPS_PICK_BF16(op, type) (isa() == Isa::amx && (type) == Type::bf16 ? amx::op : CPU_OPS_PICK(op))
#else
#define CPU_OPS_PICK(op) (baseline::op)
#define CPU_OPS_PICK_BF16(op, type) (baseline::op)
#endif

namespace cpu_ops {

// Values that are worth a thread.
constexpr int64_t kGrain = 16384;

template <class Function> void for_rows(int64_t rows, int64_t values_per_row, const Function& function) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, values_per_row)), function);
}

inline void check_rows(const torch::stable::Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1), name,
                  ": expected 2 dimensions, the last contiguous");
}

}  // namespace cpu_ops
