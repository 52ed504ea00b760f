#include "product_launch.h"

namespace cuda_ops {

void launch_product_int8(ScalarType type, int tile, int tiles, const Place& place, const ProductParams& params) {
  launch_product<Int8, 16, 64, 128>(type, tile, tiles, place, params);
}

}  // namespace cuda_ops
