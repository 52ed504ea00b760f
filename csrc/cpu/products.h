// What the ops with packed weights share (linear.cpp, block.cpp): checks of tensors, and which rows go together.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "deal.h"
#include "linear.h"

namespace cpu_ops {

using OptionalTensor = std::optional<torch::stable::Tensor>;

constexpr int64_t kCacheBytes = 1280 * 1024;         // of rows that go together: the second-level cache has 2 MiB
constexpr int64_t kLeastRows = 64, kMostRows = 256;  // that go together: fewer read weights too often
constexpr int64_t kFewRows = 64;                     // up to so many a thread, threads share the weights, not the rows

// bytes: of what a row has in the cache.
inline int64_t rows_together(int64_t bytes) { return std::clamp(kCacheBytes / bytes, kLeastRows, kMostRows); }

inline bool few(int64_t rows) { return rows <= kFewRows * torch::stable::get_num_threads(); }

// Whether results may go past the cache: as whole lines.
inline bool has_whole_lines(const Product& product) {
  return !product.gated && product.n % (2 * kStrip) == 0 && reinterpret_cast<uintptr_t>(product.out) % 64 == 0;
}

inline const void* checked(const OptionalTensor& x, torch::headeronly::ScalarType type, int64_t count, const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == type && x->is_contiguous() && x->numel() == count, name, ": expected ", count,
                  " contiguous values of the dtype that the op has for it");
  return x->const_data_ptr();
}

// A product without inputs and outputs; activation: -1 for none.
Product product_of(const torch::stable::Tensor& packed, const OptionalTensor& bias, const OptionalTensor& scales, int64_t n,
                   int64_t k, int64_t activation = -1, bool gated = false);

// All rows, dealt out among torch's threads: parts of the weights if there are few.
void multiply(const Product& product, int64_t rows);

}  // namespace cpu_ops
