#include "attention_coded.cuh"

#include "attention_launch.h"

namespace cuda_ops {
namespace {

template <class Function> void with_form(Form form, const Function& function) {
  switch (form) {
    case Form::int8: return function(std::integral_constant<Form, Form::int8>{});
    case Form::int4: return function(std::integral_constant<Form, Form::int4>{});
    case Form::fp8: return function(std::integral_constant<Form, Form::fp8>{});
  }
}

}  // namespace

void launch_decode_coded(ScalarType type, int head_dim, int grid_x, const Place& place, const AttentionParams& params) {
  with_half(type, "q", [&]<class Tagged>(Tagged) {
    with_head_dim(head_dim, [&](auto size) {
      with_form(params.form, [&](auto form) {
        using Tile = CodedTile<typename Tagged::type, size.value, form.value>;
        using Shape = DecodeShape<Tile>;
        const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(params.num_kv_heads * params.row_tiles));
        launch(decode_kernel<Tile>, grid, dim3(Shape::kWarps * 32), Shape::kSharedBytes, place, params);
      });
    });
  });
}

}  // namespace cuda_ops
