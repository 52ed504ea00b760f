// The ops sample and apply_penalties: checks and launches.

#include "sampling.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "tensors.h"

namespace cuda_ops {
namespace {

void check_rows(const Tensor& x, ScalarType type, int64_t rows, int64_t columns, const char* name) {
  check_dense_rows(x, 2, name);
  STD_TORCH_CHECK(x.scalar_type() == type, name, type == ScalarType::Float ? ": expected float32" : ": expected int32");
  STD_TORCH_CHECK(x.size(0) == rows && x.size(1) == columns, name, ": [", x.size(0), ", ", x.size(1), "]; expected [",
                  rows, ", ", columns, "]");
}

const float* floats(const Tensor& x, int64_t size, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, name, ": expected float32");
  check_vector(x, size, name);
  return data<float>(x);
}

Tensor sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
              const Tensor& min_p, const Tensor& stream, const Tensor& position) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits: expected [num_seqs, vocab]");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_rows(logits, ScalarType::Float, rows, vocab, "logits");
  Tensor out = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  const SampleParams p{data<float>(logits), floats(temperature, rows, "temperature"), int64s(top_k, rows, "top_k"),
                       floats(top_p, rows, "top_p"), floats(min_p, rows, "min_p"), int64s(stream, rows, "stream"),
                       int64s(position, rows, "position"), mutable_data<int64_t>(out), logits.stride(0),
                       static_cast<int>(vocab)};
  if (rows == 0) return out;
  const Place place(logits.get_device_index());
  launch(sample_kernel, dim3(static_cast<unsigned>(rows)), dim3(kSampleThreads), sizeof(SampleShared), place, p);
  return out;
}

Tensor apply_penalties(const Tensor& logits, const Tensor& prompt_counts, const Tensor& output_counts,
                       const Tensor& repetition, const Tensor& presence, const Tensor& frequency) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: expected [num_seqs, vocab]");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_rows(logits, ScalarType::Float, rows, vocab, "logits");
  check_rows(prompt_counts, ScalarType::Int, rows, vocab, "prompt_counts");
  check_rows(output_counts, ScalarType::Int, rows, vocab, "output_counts");
  Tensor out = torch::stable::new_empty(logits, {rows, vocab});
  const PenaltyParams p{data<float>(logits), data<int32_t>(prompt_counts), data<int32_t>(output_counts),
                        floats(repetition, rows, "repetition_penalty"), floats(presence, rows, "presence_penalty"),
                        floats(frequency, rows, "frequency_penalty"), mutable_data<float>(out), logits.stride(0),
                        prompt_counts.stride(0), output_counts.stride(0), static_cast<int>(vocab)};
  if (rows == 0 || vocab == 0) return out;
  const Place place(logits.get_device_index());
  launch(penalty_kernel, dim3(static_cast<unsigned>(ceil_div(vocab, 256)), static_cast<unsigned>(rows)), dim3(256), 0,
         place, p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor stream, "
      "Tensor position) -> Tensor");
  library.def(
      "apply_penalties(Tensor logits, Tensor prompt_counts, Tensor output_counts, Tensor repetition, Tensor presence, "
      "Tensor frequency) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("sample", TORCH_BOX(&sample));
  library.impl("apply_penalties", TORCH_BOX(&apply_penalties));
}

}  // namespace cuda_ops
