// The ops route, sort_slots and combine of mixtures of experts: checks and launches.

#include "moe.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "tensors.h"

namespace cuda_ops {
namespace {

constexpr int kMostExperts = 1024;

Scoring scoring_of(const std::string& name) {
  if (name == "softmax") return Scoring::softmax;
  if (name == "softmax_of_chosen") return Scoring::softmax_of_chosen;
  STD_TORCH_CHECK(name == "sigmoid", "scoring: ", name, "; expected softmax, softmax_of_chosen or sigmoid");
  return Scoring::sigmoid;
}

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t top_k, std::string scoring, bool normalize, double scale,
                                 const std::optional<Tensor>& bias, int64_t num_groups, int64_t top_groups) {
  check_dense_rows(logits, 2, "logits");
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  STD_TORCH_CHECK(experts <= kMostExperts && top_k >= 1 && top_k <= experts, "logits: ", top_k, " of ", experts,
                  " experts; expected at most ", kMostExperts);
  STD_TORCH_CHECK(num_groups >= 1 && experts % num_groups == 0 && top_groups >= 1 && top_groups <= num_groups,
                  "num_groups: ", top_groups, " of ", num_groups, "; expected a divisor of ", experts);
  if (bias) {
    check_vector(*bias, experts, "bias");
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float, "bias: expected float32");
  }
  Tensor weights = torch::stable::new_empty(logits, {tokens, top_k}, ScalarType::Float);
  Tensor ids = torch::stable::new_empty(logits, {tokens, top_k}, ScalarType::Long);
  const Scoring how = scoring_of(scoring);
  if (tokens == 0) return {weights, ids};
  const Place place(logits.get_device_index());
  with_float(logits, "logits", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    const RouteParams<T> p{data<T>(logits), bias ? data<float>(*bias) : nullptr, mutable_data<float>(weights),
                           mutable_data<int64_t>(ids), logits.stride(0), static_cast<int>(tokens),
                           static_cast<int>(experts), static_cast<int>(top_k),
                           how == Scoring::softmax_of_chosen ? 1 : static_cast<int>(num_groups),
                           static_cast<int>(top_groups), how, normalize, static_cast<float>(scale)};
    const size_t bytes = kRouteWarps * (2 * experts + num_groups) * sizeof(float);
    launch(route_kernel<T>, dim3(static_cast<unsigned>(ceil_div(tokens, kRouteWarps))), dim3(kRouteWarps * 32),
           static_cast<int>(bytes), place, p);
  });
  return {weights, ids};
}

// (slots [tiles, tile], tile_experts [tiles]), int32, as ProductParams has them.
std::tuple<Tensor, Tensor> sort_slots(const Tensor& ids, int64_t num_experts, int64_t tile) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.is_contiguous(), "ids: expected int64, contiguous");
  STD_TORCH_CHECK(num_experts >= 1 && num_experts <= kMostExperts && tile >= 1, "num_experts: ", num_experts,
                  "; expected at most ", kMostExperts);
  const int64_t count = ids.numel(), tiles = count / tile + std::min(count, num_experts);
  Tensor slots = torch::stable::new_empty(ids, {tiles, tile}, ScalarType::Int);
  Tensor tile_experts = torch::stable::new_empty(ids, {tiles}, ScalarType::Int);
  if (count == 0) return {slots, tile_experts};
  const Place place(ids.get_device_index());
  const SortParams p{data<int64_t>(ids), mutable_data<int>(slots), mutable_data<int>(tile_experts),
                     static_cast<int>(count), static_cast<int>(num_experts), static_cast<int>(tiles),
                     static_cast<int>(tile)};
  launch(sort_slots_kernel, dim3(1), dim3(kSortThreads), static_cast<int>(2 * num_experts * sizeof(int)), place, p);
  return {slots, tile_experts};
}

// outputs: [num_tokens * top_k, size]; weights: [num_tokens, top_k] float32; ids as sort_slots has them. Returns
// [num_tokens, size].
Tensor combine(const Tensor& outputs, const Tensor& weights, const Tensor& ids) {
  STD_TORCH_CHECK(outputs.dim() == 2 && outputs.is_contiguous(), "outputs: expected [slots, size], contiguous");
  STD_TORCH_CHECK(weights.dim() == 2 && weights.is_contiguous() && weights.scalar_type() == ScalarType::Float &&
                      weights.numel() == outputs.size(0), "weights: expected [num_tokens, top_k] float32 for ",
                  outputs.size(0), " slots");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.is_contiguous() && ids.numel() == outputs.size(0),
                  "ids: expected int64, contiguous, one for each of ", outputs.size(0), " slots");
  const int64_t tokens = weights.size(0), size = outputs.size(1);
  Tensor out = torch::stable::new_empty(outputs, {tokens, size});
  if (tokens == 0 || size == 0) return out;
  const Place place(outputs.get_device_index());
  with_half(outputs.scalar_type(), "outputs", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    const CombineParams<T> p{data<T>(outputs), data<float>(weights), data<int64_t>(ids), mutable_data<T>(out), tokens,
                             static_cast<int>(size), static_cast<int>(weights.size(1))};
    with_width<T>(size % 8 == 0 && divides_16(outputs), [&](auto width) {
      const dim3 grid(static_cast<unsigned>(ceil_div(size, 256 * width.value)),
                      static_cast<unsigned>(std::min<int64_t>(tokens, 65535)));
      launch(combine_kernel<T, width.value>, grid, dim3(256), 0, place, p);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def(
      "route(Tensor logits, int top_k, str scoring, bool normalize, float scale, Tensor? bias, int num_groups, "
      "int top_groups) -> (Tensor, Tensor)");
  library.def("sort_slots(Tensor ids, int num_experts, int tile) -> (Tensor, Tensor)");
  library.def("combine(Tensor outputs, Tensor weights, Tensor ids) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("route", TORCH_BOX(&route));
  library.impl("sort_slots", TORCH_BOX(&sort_slots));
  library.impl("combine", TORCH_BOX(&combine));
}

}  // namespace cuda_ops
