// What the op linear_packed (linear.cpp) and its kernel (linear_amx.cpp) say to each other.
#pragma once

#include <stdint.h>

#include "activation.h"

namespace cpu_ops {

// A packed weight is [strips][steps] of tiles of 1 KiB: 16 outputs (a strip) by 64 bytes of inputs (32 bfloat16 or 64
// int8) as [16 groups of 4 bytes of inputs][16 outputs]; zero past the weight's sizes. Strips are even in number.
constexpr int64_t kStrip = 16, kTileBytes = 1024, kStepInputs = 64;  // outputs; bytes of a tile; bytes of a step's inputs

enum class Number : int { bf16, s8 };

// A bfloat16 weight kept as integers: (code - zero) * scale of each group of inputs, rounded, whenever rows come to it.
// Codes are [strips][steps] of tiles of [16 pairs of inputs][16 outputs][2 inputs]; a line of 8 bits: as they lie, signed,
// less 128; of 4 bits: 16 bytes, in the lower halves the first 8 outputs, in the upper ones the others.
struct GroupedInt {
  int64_t bits;         // 8, 4; 0: the weight is plain
  int64_t steps;        // of a group
  int64_t groups;
  const float* scales;  // [strips][groups][16], or with zeros [strips][groups][2][16]: scales, zeros
  bool zeros;           // less 2 ** (bits - 1); false: all are that

  int64_t tile_bytes() const { return kTileBytes / 16 * bits; }
};

// out = act(x @ weight + bias). Gated: the first half of the outputs so, times the second half; halves of whole tiles.
struct Product {
  Number number;          // of x and the weight
  const char* x;          // [rows][k]
  int64_t x_stride, k;    // in bytes
  const char* weight;     // packed
  const char* bias;       // [n] bfloat16, or null
  const float* scales;    // s8: [n], of the weight's outputs
  const float* x_scales;  // s8: [rows]
  GroupedInt codes;       // of a bf16 weight that is no tiles
  char* out;              // [rows][n], gated: [rows][n / 2]; bfloat16, contiguous
  int64_t n, steps;       // the weight's outputs; ceil(k / kStepInputs)
  bool activated, gated;
  Activation activation;
  bool streams;  // results, whole lines, go past the cache: not gated, n a multiple of 32, out aligned to 64

  int64_t tile_bytes() const { return codes.bits ? codes.tile_bytes() : kTileBytes; }
  int64_t strip_bytes() const { return steps * tile_bytes(); }
  int64_t strips() const { return (n + 2 * kStrip - 1) / (2 * kStrip) * 2; }
  int64_t out_size() const { return gated ? n / 2 : n; }
  int64_t block_outputs() const { return gated ? kStrip : 2 * kStrip; }
  // Groups of outputs that are made together.
  int64_t blocks() const { return (out_size() + block_outputs() - 1) / block_outputs(); }
  // Sums of two blocks of 32 x 32, a copy of a block's rows, and two strips that were unpacked.
  int64_t scratch_bytes() const { return 8192 + steps * (codes.bits ? 4096 : 2048); }
};

namespace amx {
#if defined(CPU_OPS_X86)
// Rows [first_row, last_row) by groups of outputs [first, last). scratch: scratch_bytes(), aligned to 64.
void multiply(const Product& product, int64_t first_row, int64_t last_row, int64_t first, int64_t last, char* scratch);
// n outputs of k bytes each into strips [first, last).
void pack(char* to, const char* weight, int64_t n, int64_t k, int64_t first, int64_t last);
#else  // never called: no such processor has the unit
inline void multiply(const Product&, int64_t, int64_t, int64_t, int64_t, char*) {}
inline void pack(char*, const char*, int64_t, int64_t, int64_t, int64_t) {}
#endif
}  // namespace amx

}  // namespace cpu_ops
