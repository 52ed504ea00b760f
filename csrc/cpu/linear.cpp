// The ops pack_weight and linear_packed: products on the matrix unit, where there is one.

#include <torch/csrc/stable/library.h>

#include "isa.h"
#include "products.h"

namespace cpu_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWide = 16384;  // outputs of a vocabulary: its rows lie a page and more apart
constexpr int64_t kTurns = 4;     // parts of the weights that a thread takes, one after the other

// Whether the ops are for this machine.
bool packs_weights() { return isa() == Isa::amx; }

int64_t bytes_of(const Tensor& x, const char* name) {
  const bool s8 = x.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK((s8 || x.scalar_type() == ScalarType::BFloat16) && x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1),
                  name, ": expected a matrix of bfloat16 or int8, the last dimension contiguous");
  return s8 ? 1 : 2;
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

// A pair of inputs of a strip's outputs: a line of GroupedInt. What is past the weight's sizes has the value 0.
void pack_line(uint8_t* to, const uint8_t* codes, int64_t bits, int64_t n, int64_t k, int64_t output, int64_t input) {
  const uint8_t half = static_cast<uint8_t>(1 << (bits - 1));
  uint8_t line[2 * kStrip];
  for (int64_t i = 0; i < 2 * kStrip; ++i) {
    const int64_t row = output + i / 2, column = input + i % 2;
    line[i] = row < n && column < k ? codes[row * k + column] : half;
  }
  for (int64_t i = 0; i < 4 * bits; ++i) to[i] = bits == 8 ? line[i] - half : line[i] | line[i + kStrip] << 4;
}

Tensor pack_codes(const Tensor& codes, int64_t bits) {
  STD_TORCH_CHECK(packs_weights(), "packed weights: this machine has no matrix unit (AMX)");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.dim() == 2 && codes.is_contiguous() &&
                      (bits == 8 || bits == 4),
                  "codes: expected a contiguous matrix of uint8, of 4 or 8 bits");
  Product product{};
  product.codes.bits = bits;
  product.n = codes.size(0);
  product.k = codes.size(1) * 2;
  product.steps = ceil(product.k, kStepInputs);
  Tensor packed = torch::stable::new_empty(codes, {product.strips() * product.strip_bytes()});
  uint8_t* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  const uint8_t* from = static_cast<const uint8_t*>(codes.const_data_ptr());
  torch::stable::parallel_for(0, product.strips(), 1, [&](int64_t first, int64_t last) {
    for (int64_t strip = first; strip < last; ++strip)
      for (int64_t pair = 0; pair < 16 * product.steps; ++pair)
        pack_line(to + strip * product.strip_bytes() + pair * 4 * bits, from, bits, product.n, codes.size(1), strip * kStrip,
                  2 * pair);
  });
  return packed;
}

Tensor linear_packed(const Tensor& x, const Tensor& packed, const OptionalTensor& bias, const OptionalTensor& scales,
                     const OptionalTensor& x_scales, int64_t out_features) {
  const int64_t bytes = bytes_of(x, "x"), rows = x.size(0);
  STD_TORCH_CHECK((packed.scalar_type() == ScalarType::Char) == (bytes == 1),
                  "x: expected int8 with a weight of int8, else bfloat16");
  STD_TORCH_CHECK((bytes == 1) == x_scales.has_value(), "x_scales: expected with int8 and only then");
  Product product = product_of(packed, bias, scales, out_features, x.size(1));
  product.x = static_cast<const char*>(x.const_data_ptr());
  product.x_stride = x.stride(0) * bytes;
  product.x_scales = static_cast<const float*>(checked(x_scales, ScalarType::Float, rows, "x_scales"));
  Tensor out = torch::stable::new_empty(x, {rows, out_features}, ScalarType::BFloat16);
  product.out = static_cast<char*>(out.mutable_data_ptr());
  product.streams = (out_features >= kWide || !few(rows)) && has_whole_lines(product);
  if (rows && out_features) multiply(product, rows);
  return out;
}

// scales of codes: [strips][groups][1, or 2 with zeros][16].
GroupedInt codes_of(const Tensor& packed, const OptionalTensor& scales, const Product& product) {
  STD_TORCH_CHECK(scales && scales->scalar_type() == ScalarType::Float && scales->dim() == 4 && scales->is_contiguous() &&
                      scales->size(0) == product.strips() && scales->size(1) >= 1 && product.steps % scales->size(1) == 0 &&
                      (scales->size(2) == 1 || scales->size(2) == 2) && scales->size(3) == kStrip,
                  "scales: expected float32 of [", product.strips(), ", groups of whole steps, 1 or 2, ", kStrip, "]");
  GroupedInt codes{};
  codes.groups = scales->size(1);
  codes.steps = product.steps / codes.groups;
  codes.scales = static_cast<const float*>(scales->const_data_ptr());
  codes.zeros = scales->size(2) == 2;
  codes.bits = packed.numel() == product.strips() * product.steps * kTileBytes / 2 ? 8 : 4;
  return codes;
}

}  // namespace

Product product_of(const Tensor& packed, const OptionalTensor& bias, const OptionalTensor& scales, int64_t n, int64_t k,
                   int64_t activation, bool gated) {
  STD_TORCH_CHECK(packs_weights(), "packed weights: this machine has no matrix unit (AMX)");
  const bool s8 = packed.scalar_type() == ScalarType::Char, codes = packed.scalar_type() == ScalarType::Byte;
  Product product{};
  product.number = s8 ? Number::s8 : Number::bf16;
  product.n = n;
  product.k = k * (s8 ? 1 : 2);
  product.steps = ceil(product.k, kStepInputs);
  if (codes) product.codes = codes_of(packed, scales, product);
  const int64_t bytes = packed.numel() * (s8 || codes ? 1 : 2);
  STD_TORCH_CHECK((s8 || codes || packed.scalar_type() == ScalarType::BFloat16) && packed.is_contiguous() &&
                      bytes == product.strips() * product.strip_bytes(),
                  "packed: expected what pack_weight or pack_codes made of a weight of ", n, " x ", k);
  STD_TORCH_CHECK((s8 || codes) == scales.has_value(), "scales: expected with integers and only then");
  STD_TORCH_CHECK(activation >= -1 && activation <= static_cast<int64_t>(Activation::swiglu_oai) &&
                      (gated ? activation >= 0 && n % (2 * kStrip) == 0
                             : activation != static_cast<int64_t>(Activation::swiglu_oai)),
                  "activation: ", activation, gated ? ", gated, " : ", not gated, ", n, " outputs");
  product.weight = static_cast<const char*>(packed.const_data_ptr());
  product.bias = static_cast<const char*>(checked(bias, ScalarType::BFloat16, n, "bias"));
  if (s8) product.scales = static_cast<const float*>(checked(scales, ScalarType::Float, n, "scales"));
  product.gated = gated;
  product.activated = activation >= 0;
  product.activation = static_cast<Activation>(std::max<int64_t>(0, activation));
  return product;
}

void multiply(const Product& product, int64_t rows) {
  const int64_t threads = torch::stable::get_num_threads();
  if (few(rows)) {
    const int64_t blocks = product.blocks(), parts = std::min(blocks, threads == 1 ? 1 : kTurns * threads);
    return deal(parts, product.scratch_bytes(), [&](int64_t i, char* scratch) {
      amx::multiply(product, 0, rows, blocks * i / parts, blocks * (i + 1) / parts, scratch);
    });
  }
  const Chunks chunks(rows, rows_together(product.k), threads);
  deal(chunks.count, product.scratch_bytes(), [&](int64_t i, char* scratch) {
    amx::multiply(product, chunks.first(i), chunks.last(i), 0, product.blocks(), scratch);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) {
  library.def("packs_weights() -> bool");
  library.def("pack_weight(Tensor weight) -> Tensor");
  library.def("pack_codes(Tensor codes, int bits) -> Tensor");
  library.def(
      "linear_packed(Tensor x, Tensor packed, Tensor? bias, Tensor? scales, Tensor? x_scales, int out_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) {
  library.impl("pack_weight", TORCH_BOX(&pack_weight));
  library.impl("pack_codes", TORCH_BOX(&pack_codes));
  library.impl("linear_packed", TORCH_BOX(&linear_packed));
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CompositeExplicitAutograd, library) {
  library.impl("packs_weights", TORCH_BOX(&packs_weights));
}

}  // namespace cpu_ops
