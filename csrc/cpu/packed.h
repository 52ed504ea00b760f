// The packed form of a bfloat16 cache block: tiles that the matrix unit (AMX) multiplies by as they lie, 1 KiB each.
// Source of the layout: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS: the second
// factor has pairs of rows interleaved.
//
// Keys of one block and KV head:   [D / 32][block_size / 16] tiles of [16 pairs of d][16 keys][2]
// Values:                          [block_size / 32][D / 16] tiles of [16 pairs of keys][16 of d][2]
// As many bytes as the plain form. D and block_size are multiples of 32.
#pragma once

#include <stdint.h>

namespace cpu_ops {

constexpr int kPackedKeys = 16;    // keys of a tile
constexpr int kPackedValues = 32;  // values of a tile
constexpr int64_t kPackedTile = 1024;

// `count` successive tokens of one head, `stride` bytes apart, as one block whose size is count rounded up to
// kPackedValues; what is past them is zero. to: aligned to 64 bytes.
namespace amx {
void pack_keys(char* to, const char* keys, int64_t stride, int64_t count, int64_t D);
void pack_values(char* to, const char* values, int64_t stride, int64_t count, int64_t D);
// The same into the slots from `slot` on of a block that has others already.
void write_keys(char* block, int64_t block_size, int64_t slot, const char* keys, int64_t stride, int64_t count, int64_t D);
void write_values(char* block, int64_t block_size, int64_t slot, const char* values, int64_t stride, int64_t count, int64_t D);
}  // namespace amx

}  // namespace cpu_ops
