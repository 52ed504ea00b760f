// What the op (attention.cpp) and its kernel (attention_kernel.cpp) say to each other. No headers that bring inline
// functions: the kernel is compiled once for each instruction set, and the linker keeps one copy of such a function.
#pragma once

#include <stdint.h>

namespace cpu_ops {

enum class Type : int { f32, f16, bf16 };
// What a cache holds: numbers of q's type, or codes with scales of their own (engines/ops/kv_cache.py).
enum class Codes : int { none, int8, int4, fp8 };

// Keys that are scored at once, at positions that are multiples of it: sums are made in the same order in any batch.
constexpr int kTile = 64;
// Query rows (token, head) that share one conversion of a tile of keys and values.
constexpr int kRows = 64;
// Items of at most kLaneRows rows that one call of a kernel computes side by side.
constexpr int kLanes = 4;
constexpr int kLaneRows = 16;
// Floats before a row's sum in its state: its running maximum and denominator, as each kernel keeps them.
constexpr int kStateHeader = 48;

// Up to kRows query rows of one KV head against the keys [begin, end) of one block table.
struct Work {
  Type type;
  int num_rows;
  int head_dim;
  const void* q[kRows];      // [head_dim] of each row
  void* out[kRows];          // the same
  int64_t position[kRows];   // of the row's token: it sees keys up to this one
  float sink[kRows];         // read if has_sinks
  float* state[kRows];       // kStateHeader + head_dim floats; or null: nothing went before
  bool store_state;          // end with the state, not with the output
  bool has_sinks;
  const int32_t* block_table;
  int64_t begin;             // a multiple of kTile
  int64_t end;
  const char* k;             // of this KV head in block 0
  const char* v;
  int64_t k_block_stride, k_slot_stride, v_block_stride, v_slot_stride;  // in bytes
  int64_t block_size;
  Codes codes;
  const float* k_scales;     // as k, if there are codes: scale and offset of each vector; of fp8, scale
  const float* v_scales;
  int64_t scales_block_stride, scales_slot_stride;  // in floats
  int64_t window;            // 0: none
  float scale;
  float softcap;             // 0: none
};

// Floats of scratch that a thread needs, aligned to 64 bytes.
inline constexpr int64_t scratch_floats(int64_t head_dim) {
  const int64_t padded = (head_dim + 63) / 64 * 64;
  return (3 * kRows + kTile) * padded + kTile * (padded + 16) + 2 * kRows * kTile + 8 * kRows;
}

// Computes one item, or up to kLanes of at most kLaneRows rows each. ahead: the items that come next, whose memory may
// be asked for meanwhile.
using Kernel = void (*)(const Work* works, int count, const Work* ahead, int num_ahead, float* scratch);

// The kernel of the instruction set in use; the one for packed caches needs AMX.
Kernel kernel(bool packed);
// The same for caches of codes.
Kernel kernel_of_codes(Type type, Codes codes);

namespace amx {
void attend(const Work* works, int count, const Work* ahead, int num_ahead, float* scratch);        // bfloat16 in a packed cache (packed.h)
void attend_codes(const Work* works, int count, const Work* ahead, int num_ahead, float* scratch);  // bfloat16 and float16; int8 and int4
}  // namespace amx
namespace avx512 { void attend(const Work* works, int count, const Work* ahead, int num_ahead, float* scratch); }
namespace avx2 { void attend(const Work* works, int count, const Work* ahead, int num_ahead, float* scratch); }
namespace baseline { void attend(const Work* works, int count, const Work* ahead, int num_ahead, float* scratch); }

}  // namespace cpu_ops
