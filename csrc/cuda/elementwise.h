// Arguments of the elementwise ops, as engines/ops names them.
#pragma once

#include <string>

#include "elementwise.cuh"
#include "tensors.h"

namespace cuda_ops {

inline Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  STD_TORCH_CHECK(name == "swiglu_oai", "name: ", name, "; expected silu, gelu, gelu_tanh, relu or swiglu_oai");
  return Activation::swiglu_oai;
}

}  // namespace cuda_ops
