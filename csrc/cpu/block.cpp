// The ops mlp_packed and block_packed: products one after the other over rows that go together, norms between them. What
// is between them stays in a thread's cache.

#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "elementwise.h"
#include "isa.h"
#include "products.h"
#include "quantize.h"
#include "rows.h"
#include "tensors.h"

namespace cpu_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t whole_lines(int64_t bytes) { return ceil(bytes, 64) * 64; }

// A product, and what 8-bit inputs are rounded with: one scale of all, or null: each row has its own.
struct Stage {
  Product product;
  const float* scale;

  bool s8() const { return product.number == Number::s8; }
  // Of rows as codes, then their scales.
  int64_t code_bytes(int64_t rows) const { return s8() ? whole_lines(rows * product.k) + rows * 4 : 0; }
};

// Rows of bfloat16; stride in bytes.
struct Rows {
  const char* at;
  int64_t stride;
};

// up and down; framed: between the stages `out` and, where it has outputs, `into`, each after its sum and norm.
struct Block {
  Rows x;
  char* residual;  // contiguous; framed
  char* result;    // contiguous
  Stage out, up, down, into;
  Norm norms[2];
  bool framed;

  bool leads_into() const { return into.product.n != 0; }
  bool layer_norms() const { return norms[0].bias != nullptr; }
  int64_t outer_bytes() const { return framed ? norms[0].size * 2 : 0; }
  int64_t inner_bytes() const { return up.product.out_size() * 2; }
  int64_t result_bytes() const { return (!framed ? down.product.n : leads_into() ? into.product.n : norms[0].size) * 2; }
  int64_t code_bytes(int64_t rows) const {
    return std::max({out.code_bytes(rows), up.code_bytes(rows), down.code_bytes(rows), into.code_bytes(rows)});
  }
  int64_t scratch_bytes() const {
    return std::max({out.product.scratch_bytes(), up.product.scratch_bytes(), down.product.scratch_bytes(),
                     into.product.scratch_bytes()});
  }
};

// Where rows are kept between stages.
struct Between {
  char *outer, *inner, *codes;

  static int64_t bytes(const Block& block, int64_t rows) {
    return whole_lines(rows * block.outer_bytes()) + whole_lines(rows * block.inner_bytes()) +
           block.code_bytes(rows);
  }
  Between(const Block& block, int64_t rows, char* room)
      : outer(room),
        inner(outer + whole_lines(rows * block.outer_bytes())),
        codes(inner + whole_lines(rows * block.inner_bytes())) {}
};

// One thread with rows of its own.
struct Alone {
  char* scratch;

  // leaves: whether its results leave the cache.
  void multiply(Product& product, int64_t rows, bool leaves) const {
    product.streams = leaves && has_whole_lines(product);
    amx::multiply(product, 0, rows, 0, product.blocks(), scratch);
  }
  template <class Function> void each(int64_t rows, int64_t, const Function& function) const { function(0, rows); }
};

// All threads with the same rows.
struct Together {
  void multiply(const Product& product, int64_t rows, bool) const { cpu_ops::multiply(product, rows); }
  template <class Function> void each(int64_t rows, int64_t size, const Function& function) const { for_rows(rows, size, function); }
};

template <class Threads>
void multiply(const Stage& stage, Rows x, int64_t rows, char* codes, char* out, const Threads& threads, bool leaves = false) {
  Product product = stage.product;
  product.out = out;
  product.x = x.at;
  product.x_stride = x.stride;
  if (stage.s8()) {
    Quantize what{Type::bf16, product.k, x.stride / 2, x.at, stage.scale, reinterpret_cast<int8_t*>(codes), nullptr};
    what.scales = reinterpret_cast<float*>(codes + whole_lines(rows * product.k));
    threads.each(rows, product.k, [&](int64_t first, int64_t last) { CPU_OPS_PICK(quantize_rows)(what, first, last); });
    product.x = codes;
    product.x_stride = product.k;
    product.x_scales = what.scales;
  }
  threads.multiply(product, rows, leaves);
}

// The norm of the sum of x, which may be overwritten, and the residual, which becomes what the next sum is made with.
template <class Threads>
Rows add_norm(const Block& block, int which, char* x, char* residual, int64_t rows, char* out, const Threads& threads) {
  Norm norm = block.norms[which];
  norm.x = x;
  norm.residual = norm.total = residual;
  norm.out = out;
  const auto run = block.layer_norms() ? CPU_OPS_PICK_BF16(layer_norm, norm.type) : CPU_OPS_PICK_BF16(rms_norm, norm.type);
  threads.each(rows, norm.size, [&](int64_t first, int64_t last) { run(norm, first, last); });
  return {out, norm.size * 2};
}

template <class Threads>
void run(const Block& block, int64_t first, int64_t rows, const Between& between, const Threads& threads) {
  const auto [outer, inner, codes] = between;
  char *const result = block.result + first * block.result_bytes(), *residual = block.residual + first * block.outer_bytes();
  // A norm's result; of a layer norm it is the residual as well.
  char* const normed = block.layer_norms() ? residual : outer;
  Rows x{block.x.at + first * block.x.stride, block.x.stride};
  if (block.framed) {
    multiply(block.out, x, rows, codes, outer, threads);
    x = add_norm(block, 0, outer, residual, rows, normed, threads);
  }
  multiply(block.up, x, rows, codes, inner, threads);
  multiply(block.down, {inner, block.inner_bytes()}, rows, codes, block.framed ? outer : result, threads, !block.framed);
  if (!block.framed) return;
  x = add_norm(block, 1, outer, residual, rows, block.leads_into() ? normed : result, threads);
  if (block.leads_into()) multiply(block.into, x, rows, codes, result, threads, true);
}

void run(const Block& block, int64_t rows) {
  if (few(rows)) {
    const Room room(Between::bytes(block, rows));
    return run(block, 0, rows, Between(block, rows, room.get()), Together{});
  }
  const Chunks chunks(rows, rows_together(block.inner_bytes()), torch::stable::get_num_threads());
  const int64_t scratch = block.scratch_bytes();
  deal(chunks.count, scratch + Between::bytes(block, chunks.size), [&](int64_t i, char* room) {
    const int64_t first = chunks.first(i), count = chunks.last(i) - first;
    run(block, first, count, Between(block, count, room + scratch), Alone{room});
  });
}

// A weight as the ops get it.
struct Weight {
  const Tensor& packed;
  const OptionalTensor &bias, &scales, &scale;

  Stage stage(int64_t n, int64_t k, int64_t activation = -1, bool gated = false) const {
    return {product_of(packed, bias, scales, n, k, activation, gated),
            static_cast<const float*>(checked(scale, ScalarType::Float, 1, "scale"))};
  }
};

Norm norm_of(const Tensor& weight, const OptionalTensor& bias, double eps, double weight_offset, int64_t size) {
  Norm norm{};
  norm.type = Type::bf16;
  norm.size = norm.x_stride = norm.residual_stride = size;
  norm.weight = checked(weight, ScalarType::BFloat16, size, "norm");
  norm.bias = checked(bias, ScalarType::BFloat16, size, "norm_bias");
  norm.eps = static_cast<float>(eps);
  norm.weight_offset = static_cast<float>(weight_offset);
  return norm;
}

Rows rows_of(const Tensor& x, const char* name) {
  check_rows(x, name);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, name, ": expected bfloat16");
  return {static_cast<const char*>(x.const_data_ptr()), x.stride(0) * 2};
}

Tensor mlp_packed(const Tensor& x, const Tensor& up, const OptionalTensor& up_bias, const OptionalTensor& up_scales,
                  const OptionalTensor& up_scale, const Tensor& down, const OptionalTensor& down_bias,
                  const OptionalTensor& down_scales, const OptionalTensor& down_scale, int64_t inner, int64_t out_features,
                  int64_t activation, bool gated) {
  STD_TORCH_CHECK(activation >= 0, "activation: ", activation);
  Block block{};
  block.x = rows_of(x, "x");
  block.up = Weight{up, up_bias, up_scales, up_scale}.stage(gated ? 2 * inner : inner, x.size(1), activation, gated);
  block.down = Weight{down, down_bias, down_scales, down_scale}.stage(out_features, inner);
  Tensor result = torch::stable::new_empty(x, {x.size(0), out_features});
  block.result = static_cast<char*>(result.mutable_data_ptr());
  if (x.size(0) && out_features) run(block, x.size(0));
  return result;
}

Tensor block_packed(const Tensor& attended, const Tensor& residual, const Tensor& out, const OptionalTensor& out_bias,
                    const OptionalTensor& out_scales, const OptionalTensor& out_scale, const Tensor& norm,
                    const OptionalTensor& norm_bias, double eps, double weight_offset, const Tensor& up,
                    const OptionalTensor& up_bias, const OptionalTensor& up_scales, const OptionalTensor& up_scale,
                    const Tensor& down, const OptionalTensor& down_bias, const OptionalTensor& down_scales,
                    const OptionalTensor& down_scale, int64_t inner, int64_t activation, bool gated, const Tensor& next_norm,
                    const OptionalTensor& next_norm_bias, double next_eps, double next_weight_offset,
                    const OptionalTensor& into, const OptionalTensor& into_bias, const OptionalTensor& into_scales,
                    const OptionalTensor& into_scale, int64_t out_features) {
  STD_TORCH_CHECK(activation >= 0, "activation: ", activation);
  const int64_t rows = attended.size(0), size = norm.size(0);
  STD_TORCH_CHECK(residual.dim() == 2 && residual.size(0) == rows && residual.size(1) == size &&
                      residual.scalar_type() == ScalarType::BFloat16 && residual.is_contiguous(),
                  "residual: expected a contiguous matrix of ", rows, " x ", size, " in bfloat16");
  STD_TORCH_CHECK(norm_bias.has_value() == next_norm_bias.has_value(), "norms: expected both with a bias, or neither");
  Block block{};
  block.framed = true;
  block.x = rows_of(attended, "attended");
  block.residual = static_cast<char*>(residual.mutable_data_ptr());
  block.out = Weight{out, out_bias, out_scales, out_scale}.stage(size, attended.size(1));
  block.norms[0] = norm_of(norm, norm_bias, eps, weight_offset, size);
  block.up = Weight{up, up_bias, up_scales, up_scale}.stage(gated ? 2 * inner : inner, size, activation, gated);
  block.down = Weight{down, down_bias, down_scales, down_scale}.stage(size, inner);
  block.norms[1] = norm_of(next_norm, next_norm_bias, next_eps, next_weight_offset, size);
  if (into) block.into = Weight{*into, into_bias, into_scales, into_scale}.stage(out_features, size);
  Tensor result = torch::stable::new_empty(attended, {rows, into ? out_features : size});
  block.result = static_cast<char*>(result.mutable_data_ptr());
  if (rows && size) run(block, rows);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) {
  library.def(
      "mlp_packed(Tensor x, Tensor up, Tensor? up_bias, Tensor? up_scales, Tensor? up_scale, Tensor down, "
      "Tensor? down_bias, Tensor? down_scales, Tensor? down_scale, int inner, int out_features, int activation, bool gated) "
      "-> Tensor");
  library.def(
      "block_packed(Tensor attended, Tensor(a!) residual, Tensor out, Tensor? out_bias, Tensor? out_scales, "
      "Tensor? out_scale, Tensor norm, Tensor? norm_bias, float eps, float weight_offset, Tensor up, Tensor? up_bias, "
      "Tensor? up_scales, Tensor? up_scale, Tensor down, Tensor? down_bias, Tensor? down_scales, Tensor? down_scale, "
      "int inner, int activation, bool gated, Tensor next_norm, Tensor? next_norm_bias, float next_eps, "
      "float next_weight_offset, Tensor? into, Tensor? into_bias, Tensor? into_scales, Tensor? into_scale, "
      "int out_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) {
  library.impl("mlp_packed", TORCH_BOX(&mlp_packed));
  library.impl("block_packed", TORCH_BOX(&block_packed));
}

}  // namespace cpu_ops
