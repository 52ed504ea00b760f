// How ops read tensors: checks that name the argument, what it is and what is expected, and types as template arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <primitives.cuh>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "kv_codes.cuh"

namespace cuda_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T> struct Tag { using type = T; };

// Calls function(Tag<T>{}) with the tensor's type. Raises for a type that is not one of float32, bfloat16, float16.
template <class Function> void with_float(const Tensor& tensor, const char* name, const Function& function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return function(Tag<float>{});
    case ScalarType::BFloat16: return function(Tag<bf16>{});
    case ScalarType::Half: return function(Tag<fp16>{});
    default: STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16");
  }
}

template <class Function> void with_half(ScalarType type, const char* name, const Function& function) {
  if (type == ScalarType::BFloat16) return function(Tag<bf16>{});
  STD_TORCH_CHECK(type == ScalarType::Half, name, ": expected float16 or bfloat16");
  function(Tag<fp16>{});
}

inline void check_dense_rows(const Tensor& x, int64_t dims, const char* name) {
  STD_TORCH_CHECK(x.dim() == dims, name, ": ", x.dim(), " dimensions; expected ", dims);
  STD_TORCH_CHECK(x.size(dims - 1) <= 1 || x.stride(dims - 1) == 1, name,
                  ": its last dimension has stride ", x.stride(dims - 1), "; expected 1; call contiguous()");
}

inline void check_like(const Tensor& x, const Tensor& like, const char* name, const char* of) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, ": expected the dtype of ", of);
  STD_TORCH_CHECK(x.get_device_index() == like.get_device_index(), name, ": expected the device of ", of);
}

inline void check_size(const Tensor& x, int64_t dim, int64_t size, const char* name) {
  STD_TORCH_CHECK(x.size(dim) == size, name, ": dimension ", dim, " is ", x.size(dim), "; expected ", size);
}

inline void check_vector(const Tensor& x, int64_t size, const char* name) {
  STD_TORCH_CHECK(x.dim() == 1 && x.is_contiguous() && x.size(0) == size, name, ": expected [", size, "], contiguous");
}

inline const int32_t* int32s(const Tensor& x, int64_t size, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int, name, ": expected int32");
  check_vector(x, size, name);
  return static_cast<const int32_t*>(x.const_data_ptr());
}

inline const int64_t* int64s(const Tensor& x, int64_t size, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long, name, ": expected int64");
  check_vector(x, size, name);
  return static_cast<const int64_t*>(x.const_data_ptr());
}

template <class T> const T* data(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }
template <class T> T* mutable_data(const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

inline bool divides_16(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

// Calls function(width) with the values that a thread may load at once of T: 16 bytes, or one value where addresses or
// sizes do not allow it.
template <class T, class Function> void with_width(bool wide, const Function& function) {
  if (wide) return function(std::integral_constant<int, 16 / static_cast<int>(sizeof(T))>{});
  function(std::integral_constant<int, 1>{});
}

inline bool all_divide(int64_t by, std::initializer_list<int64_t> values) {
  return std::all_of(values.begin(), values.end(), [&](int64_t value) { return value % by == 0; });
}

inline bool all_aligned(std::initializer_list<const Tensor*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor* tensor) { return divides_16(*tensor); });
}

// As engines/ops/kv_cache.py names them.
inline Form form_of(const std::string& kv_dtype) {
  if (kv_dtype == "int8") return Form::int8;
  if (kv_dtype == "int4") return Form::int4;
  STD_TORCH_CHECK(kv_dtype == "fp8", "kv_dtype: ", kv_dtype, "; expected int8, int4 or fp8");
  return Form::fp8;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cuda_ops
