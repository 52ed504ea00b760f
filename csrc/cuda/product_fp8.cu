#include "product_launch.h"

namespace cuda_ops {

void launch_product_fp8(ScalarType type, int tile, int tiles, const Place& place, const ProductParams& params) {
  launch_product<Fp8, 16, 64>(type, tile, tiles, place, params);
}

}  // namespace cuda_ops
