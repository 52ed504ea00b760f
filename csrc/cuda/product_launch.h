// The launch of product_kernel for one format.
#pragma once

#include "product.cuh"
#include "tensors.h"

namespace cuda_ops {

// TILES: tokens of a tile that the kernel is compiled for; `tile` is one of them.
template <template <class> class Format, int... TILES>
void launch_product(ScalarType type, int tile, int tiles, const Place& place, const ProductParams& p) {
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.padded_out / kProductRows),
                  static_cast<unsigned>(p.splits));
  with_half(type, "x", [&]<class Tagged>(Tagged) {
    using Own = Format<typename Tagged::type>;
    const bool found =
        ((tile == TILES && (launch(product_kernel<Own, TILES>, grid, dim3(ProductShape<Own, TILES>::kThreads),
                                   ProductShape<Own, TILES>::kSharedBytes, place, p), true)) || ...);
    STD_TORCH_CHECK(found, "slots: tiles of ", tile, " tokens; expected a size that the format is compiled for");
  });
}

}  // namespace cuda_ops
