// What the ops have in common in reading tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "attention.h"

namespace cpu_ops {

inline Type type_of(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16");
  }
}

inline int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

}  // namespace cpu_ops
