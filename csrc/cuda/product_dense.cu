#include "product_launch.h"

namespace cuda_ops {

void launch_product_dense(ScalarType type, int tile, int tiles, const Place& place, const ProductParams& params) {
  launch_product<Dense, 16, 64, 128>(type, tile, tiles, place, params);
}

}  // namespace cuda_ops
