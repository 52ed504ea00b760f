// The ops pack_weight, linear_packed and mlp_packed: products on the matrix unit, where there is one.

#include "linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "deal.h"
#include "isa.h"
#include "quantize.h"
#include "rows.h"
#include "tensors.h"

namespace cpu_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kCacheBytes = 1280 * 1024;             // of rows that go together: the second-level cache has 2 MiB
constexpr int64_t kLeastRows = 64, kMostRows = 256;     // that go together: fewer read weights too often
constexpr int64_t kFewRows = 64;                        // up to so many a thread, threads share the weights, not the rows
constexpr int64_t kWide = 16384;                        // outputs of a vocabulary: its rows lie a page and more apart
constexpr int64_t kTurns = 4;                           // parts of the weights that a thread takes, one after the other

// Whether the ops are for this machine.
bool packs_weights() { return isa() == Isa::amx; }

int64_t bytes_of(const Tensor& x, const char* name) {
  const bool s8 = x.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK((s8 || x.scalar_type() == ScalarType::BFloat16) && x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1),
                  name, ": expected a matrix of bfloat16 or int8, the last dimension contiguous");
  return s8 ? 1 : 2;
}

const void* checked(const OptionalTensor& x, ScalarType type, int64_t count, const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == type && x->is_contiguous() && x->numel() == count, name, ": expected ", count,
                  " contiguous values of the dtype that the op has for it");
  return x->const_data_ptr();
}

// A product without inputs and outputs.
Product product_of(const Tensor& packed, const OptionalTensor& bias, const OptionalTensor& scales, int64_t n, int64_t k,
                   int64_t activation = -1, bool gated = false) {
  STD_TORCH_CHECK(packs_weights(), "packed weights: this machine has no matrix unit (AMX)");
  const bool s8 = packed.scalar_type() == ScalarType::Char;
  const int64_t bytes = s8 ? 1 : 2;
  Product product{};
  product.number = s8 ? Number::s8 : Number::bf16;
  product.n = n;
  product.k = k * bytes;
  product.steps = ceil(product.k, kStepInputs);
  STD_TORCH_CHECK((s8 || packed.scalar_type() == ScalarType::BFloat16) && packed.is_contiguous() &&
                      packed.numel() * bytes == product.strips() * product.strip_bytes(),
                  "packed: expected what pack_weight made of a weight of ", n, " x ", k);
  STD_TORCH_CHECK(s8 == scales.has_value(), "scales: expected with int8 and only then");
  STD_TORCH_CHECK(activation >= -1 && activation <= static_cast<int64_t>(Activation::swiglu_oai) &&
                      (gated ? activation >= 0 && n % (2 * kStrip) == 0
                             : activation != static_cast<int64_t>(Activation::swiglu_oai)),
                  "activation: ", activation, gated ? ", gated, " : ", not gated, ", n, " outputs");
  product.weight = static_cast<const char*>(packed.const_data_ptr());
  product.bias = static_cast<const char*>(checked(bias, ScalarType::BFloat16, n, "bias"));
  product.scales = static_cast<const float*>(checked(scales, ScalarType::Float, n, "scales"));
  product.gated = gated;
  product.activated = activation >= 0;
  product.activation = static_cast<Activation>(std::max<int64_t>(0, activation));
  return product;
}

int64_t rows_together(int64_t bytes) { return std::clamp(kCacheBytes / bytes, kLeastRows, kMostRows); }

bool few(int64_t rows) { return rows <= kFewRows * torch::stable::get_num_threads(); }

void multiply(const Product& product, int64_t rows) {
  const int64_t threads = torch::stable::get_num_threads(), room = scratch_bytes(product.steps);
  if (few(rows)) {
    const int64_t blocks = product.blocks(), parts = std::min(blocks, threads == 1 ? 1 : kTurns * threads);
    return deal(parts, room, [&](int64_t i, char* scratch) {
      amx::multiply(product, 0, rows, blocks * i / parts, blocks * (i + 1) / parts, scratch);
    });
  }
  const Chunks chunks(rows, rows_together(product.k), threads);
  deal(chunks.count, room, [&](int64_t i, char* scratch) {
    amx::multiply(product, chunks.first(i), chunks.last(i), 0, product.blocks(), scratch);
  });
}

// x to int8 codes, each row by its own scale, or all by the given one.
void quantize(const char* x, int64_t stride, int64_t size, const float* given, int64_t rows, int8_t* codes, float* scales) {
  Quantize what{};
  what.type = Type::bf16;
  what.size = size;
  what.x_stride = stride / 2;
  what.x = x;
  what.given = given;
  what.codes = codes;
  what.scales = scales;
  CPU_OPS_PICK(quantize_rows)(what, 0, rows);
}

Tensor pack_weight(const Tensor& weight) {
  STD_TORCH_CHECK(packs_weights(), "packed weights: this machine has no matrix unit (AMX)");
  const int64_t bytes = bytes_of(weight, "weight");
  STD_TORCH_CHECK(weight.is_contiguous(), "weight: expected a contiguous matrix");
  Product product{};
  product.n = weight.size(0);
  product.k = weight.size(1) * bytes;
  product.steps = ceil(product.k, kStepInputs);
  Tensor packed = torch::stable::new_empty(weight, {product.strips() * product.strip_bytes() / bytes});
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  torch::stable::parallel_for(0, product.strips(), 1, [&](int64_t first, int64_t last) {
    amx::pack(to, from, product.n, product.k, first, last);
  });
  return packed;
}

Tensor linear_packed(const Tensor& x, const Tensor& packed, const OptionalTensor& bias, const OptionalTensor& scales,
                     const OptionalTensor& x_scales, int64_t out_features) {
  const int64_t bytes = bytes_of(x, "x"), rows = x.size(0);
  STD_TORCH_CHECK(packed.scalar_type() == x.scalar_type(), "packed: expected x's dtype");
  STD_TORCH_CHECK((bytes == 1) == x_scales.has_value(), "x_scales: expected with int8 and only then");
  Product product = product_of(packed, bias, scales, out_features, x.size(1));
  product.x = static_cast<const char*>(x.const_data_ptr());
  product.x_stride = x.stride(0) * bytes;
  product.x_scales = static_cast<const float*>(checked(x_scales, ScalarType::Float, rows, "x_scales"));
  Tensor out = torch::stable::new_empty(x, {rows, out_features}, ScalarType::BFloat16);
  product.out = static_cast<char*>(out.mutable_data_ptr());
  product.streams = out_features >= kWide && out_features % (2 * kStrip) == 0 && reinterpret_cast<uintptr_t>(product.out) % 64 == 0;
  if (rows && out_features) multiply(product, rows);
  return out;
}

// Two products, one after the other, over rows that go together: what is between them stays in a thread's cache.
struct Mlp {
  Product up, down;
  const float *up_scale, *down_scale;  // s8: of all inputs; null: each row has its own

  bool s8() const { return up.number == Number::s8; }
  int64_t inner() const { return up.out_size(); }
  int64_t inner_bytes() const { return inner() * 2; }
  int64_t code_bytes(int64_t rows) const { return s8() ? ceil(rows * (std::max(up.k, inner()) + 4), 64) * 64 : 0; }

  // The product of rows that lie elsewhere; s8: of their codes, which `room` has place for.
  static Product of(Product product, const char* x, int64_t stride, const float* scale, int64_t rows, char* room, char* out) {
    product.x = x;
    product.x_stride = stride;
    product.out = out;
    if (product.number == Number::s8) {
      int8_t* codes = reinterpret_cast<int8_t*>(room);
      float* scales = reinterpret_cast<float*>(room + rows * product.k);
      quantize(x, stride, product.k, scale, rows, codes, scales);
      product.x = room;
      product.x_stride = product.k;
      product.x_scales = scales;
    }
    return product;
  }
};

void run(const Mlp& mlp, const char* x, int64_t x_stride, char* out, int64_t rows) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t scratch = scratch_bytes(std::max(mlp.up.steps, mlp.down.steps)), out_stride = mlp.down.n * 2;
  if (few(rows)) {
    const Room inner(rows * mlp.inner_bytes()), codes(mlp.code_bytes(rows));
    multiply(Mlp::of(mlp.up, x, x_stride, mlp.up_scale, rows, codes.get(), inner.get()), rows);
    return multiply(Mlp::of(mlp.down, inner.get(), mlp.inner_bytes(), mlp.down_scale, rows, codes.get(), out), rows);
  }
  const Chunks chunks(rows, rows_together(mlp.inner_bytes()), threads);
  const int64_t inner_bytes = ceil(chunks.size * mlp.inner_bytes(), 64) * 64;
  deal(chunks.count, scratch + inner_bytes + mlp.code_bytes(chunks.size), [&](int64_t i, char* room) {
    const int64_t first = chunks.first(i), count = chunks.last(i) - first;
    char *const inner = room + scratch, *const codes = inner + inner_bytes;
    const Product up = Mlp::of(mlp.up, x + first * x_stride, x_stride, mlp.up_scale, count, codes, inner);
    amx::multiply(up, 0, count, 0, up.blocks(), room);
    const Product down = Mlp::of(mlp.down, inner, mlp.inner_bytes(), mlp.down_scale, count, codes, out + first * out_stride);
    amx::multiply(down, 0, count, 0, down.blocks(), room);
  });
}

Tensor mlp_packed(const Tensor& x, const Tensor& up, const OptionalTensor& up_bias, const OptionalTensor& up_scales,
                  const OptionalTensor& up_scale, const Tensor& down, const OptionalTensor& down_bias,
                  const OptionalTensor& down_scales, const OptionalTensor& down_scale, int64_t inner, int64_t out_features,
                  int64_t activation, bool gated) {
  STD_TORCH_CHECK(bytes_of(x, "x") == 2, "x: expected bfloat16");
  STD_TORCH_CHECK(up.scalar_type() == down.scalar_type(), "up, down: expected one dtype");
  STD_TORCH_CHECK(activation >= 0, "activation: ", activation);
  Mlp mlp{};
  mlp.up = product_of(up, up_bias, up_scales, gated ? 2 * inner : inner, x.size(1), activation, gated);
  mlp.down = product_of(down, down_bias, down_scales, out_features, inner);
  mlp.up_scale = static_cast<const float*>(checked(up_scale, ScalarType::Float, 1, "up_scale"));
  mlp.down_scale = static_cast<const float*>(checked(down_scale, ScalarType::Float, 1, "down_scale"));
  Tensor out = torch::stable::new_empty(x, {x.size(0), out_features});
  if (x.size(0) && out_features)
    run(mlp, static_cast<const char*>(x.const_data_ptr()), x.stride(0) * 2, static_cast<char*>(out.mutable_data_ptr()), x.size(0));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) {
  library.def("packs_weights() -> bool");
  library.def("pack_weight(Tensor weight) -> Tensor");
  library.def(
      "linear_packed(Tensor x, Tensor packed, Tensor? bias, Tensor? scales, Tensor? x_scales, int out_features) -> Tensor");
  library.def(
      "mlp_packed(Tensor x, Tensor up, Tensor? up_bias, Tensor? up_scales, Tensor? up_scale, Tensor down, "
      "Tensor? down_bias, Tensor? down_scales, Tensor? down_scale, int inner, int out_features, int activation, bool gated) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) {
  library.impl("pack_weight", TORCH_BOX(&pack_weight));
  library.impl("linear_packed", TORCH_BOX(&linear_packed));
  library.impl("mlp_packed", TORCH_BOX(&mlp_packed));
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CompositeExplicitAutograd, library) {
  library.impl("packs_weights", TORCH_BOX(&packs_weights));
}

}  // namespace cpu_ops
