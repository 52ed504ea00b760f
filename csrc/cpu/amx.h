// The matrix unit's tile configuration: a thread's own, given back as it was found.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace cpu_ops {
namespace amx {

constexpr int kSide = 16;  // rows of a tile; 16 float32 or 32 bfloat16 a row

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  // Tiles 0 to 4 have so many rows: those of products and of first factors. A product takes as many cycles.
  explicit TileConfig(int num_rows = kSide) {
    for (int i = 0; i < 5; ++i) rows[i] = static_cast<uint8_t>(num_rows);
  }
};

// While it lives the thread has this configuration; others (oneDNN) find theirs as they left it.
class Tiles {
 public:
  explicit Tiles(const TileConfig& ours) {
    written(&theirs_);
    _tile_storeconfig(&theirs_);
    written(&ours);
    _tile_loadconfig(&ours);
  }
  ~Tiles() {
    written(&theirs_);
    if (theirs_.palette) _tile_loadconfig(&theirs_);
    else _tile_release();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  // GCC's intrinsics claim 8 bytes of the 64: without this the other stores may be left out.
  static void written(const TileConfig* config) { asm volatile("" : : "r"(config) : "memory"); }

  TileConfig theirs_;
};

}  // namespace amx
}  // namespace cpu_ops
