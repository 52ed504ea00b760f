#include "product_launch.h"

namespace cuda_ops {

void launch_product_w4(ScalarType type, int tile, int tiles, const Place& place, const ProductParams& params) {
  launch_product<W4, 16, 32, 64>(type, tile, tiles, place, params);
}

}  // namespace cuda_ops
