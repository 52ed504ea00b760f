#include "product_launch.h"

namespace cuda_ops {

void launch_product_mxfp4(ScalarType type, int tile, int tiles, const Place& place, const ProductParams& params) {
  launch_product<Mxfp4, 16, 64>(type, tile, tiles, place, params);
}

}  // namespace cuda_ops
