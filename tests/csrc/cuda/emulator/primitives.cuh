// Stands in for csrc/cuda/primitives.cuh when kernels are built for the emulator: the same names, on the processor.
// The ops are registered for CPU tensors, so that op set and engine run through every kernel.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <utility>

#include "emulator.h"

#define CUDA_OPS_DISPATCH_KEY CPU

namespace cuda_ops {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }

template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
  if (std::isnan(x)) return {0x7FFF};
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
template <> inline fp16 from_float<fp16>(float x) { return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))}; }

template <class T> uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

inline uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float bits_float(uint32_t x) { return std::bit_cast<float>(x); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float half_bits_to_float(uint16_t bits) { return to_float(fp16{bits}); }
template <class T> float half_of(uint32_t both, int which) {
  return to_float(std::bit_cast<T>(static_cast<uint16_t>(both >> 16 * which)));
}
template <class T> uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  return pack<T>(half_of<T>(a, 0) - half_of<T>(b, 0), half_of<T>(a, 1) - half_of<T>(b, 1));
}
template <class T> uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  return pack<T>(half_of<T>(a, 0) * half_of<T>(b, 0), half_of<T>(a, 1) * half_of<T>(b, 1));
}
// E4M3 (OCP OFP8 specification 1.0): exponent bias 7, no infinity, NaN where all bits below the sign are set.
inline float e4m3_to_float(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 127) == 127) return std::nanf("");
  const float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(1.0f * mantissa, -9);
  return bits & 128 ? -size : size;
}
inline uint32_t float_to_e4m3(float x) {
  const uint32_t sign = std::signbit(x) ? 128 : 0;
  if (std::isnan(x)) return sign | 127;
  const float size = std::min(std::fabs(x), 448.0f);
  const int exponent = size < std::ldexp(1.0f, -6) ? -6 : std::ilogb(size);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));  // 16: the next exponent
  return sign | std::min(((exponent + 6) << 3) + steps, 126);
}
inline uint32_t pack_e4m3(float low, float high) { return float_to_e4m3(low) | float_to_e4m3(high) << 8; }
inline uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> 8 * (which >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}
inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
inline uint32_t not_and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (~x & mask) | bits; }
inline int keep(int x) { return x; }
inline int uniform(int x) {
  const int first = __shfl_sync(~0u, x, 0);
  if (first != x) emulator::fail("uniform: lanes have different values");
  return first;
}
inline float multiply(float a, float b) { volatile float c = a * b; return c; }
inline float add(float a, float b) { volatile float c = a + b; return c; }

inline unsigned char* shared_memory() { return emulator::block->shared; }

inline uint4 load_streaming(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("load_streaming of an address that 16 does not divide");
  return *static_cast<const uint4*>(from);
}

template <int BYTES> void copy_async_short(void* to, const void* from, bool valid) {
  if ((reinterpret_cast<uintptr_t>(to) | (valid ? reinterpret_cast<uintptr_t>(from) : 0)) % BYTES)
    emulator::fail("an asynchronous copy of an address that its size does not divide");
  const emulator::Copy copy{to, from, BYTES, emulator::thread->copy_group, valid};
  if (emulator::copies_land_early()) emulator::land(copy);
  else emulator::thread->copies.push_back(copy);
}
inline void copy_async(void* to, const void* from, bool valid) { copy_async_short<16>(to, from, valid); }
inline void copy_commit() { emulator::thread->copy_group++; }
template <int N> void copy_wait() {
  emulator::Thread& own = *emulator::thread;
  std::erase_if(own.copies, [&](const emulator::Copy& copy) {
    if (copy.group >= own.copy_group - N) return false;
    emulator::land(copy);
    return true;
  });
}

inline int atomic_add(int* at, int value) { return std::exchange(*at, *at + value); }
inline void fence() {}
template <class T> T load_shared_by_blocks(const T* from) { return *from; }
inline void set_flag(uint64_t* at, uint64_t value) { *at = value; emulator::block->events++; }
inline void wait_flag(const uint64_t* at, uint64_t value) {
  emulator::wait_until([at, value] { return *at >= value; }, "wait_flag");
}
inline uint4 load_from_peer(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("load_from_peer of an address that 16 does not divide");
  return *static_cast<const uint4*>(from);
}

template <bool TRANSPOSED> void load_matrices_either(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("load_matrices of an address that 16 does not divide");
  struct Four { uint32_t v[4]; };
  const Four got = emulator::exchange(~0u, static_cast<const uint16_t*>(row), [&](auto get) {
    Four four;
    const int l = emulator::lane();
    for (int i = 0; i < 4; ++i) {
      const int r = l / 4, c = l % 4 * 2;
      const uint32_t low = TRANSPOSED ? get(i * 8 + c)[r] : get(i * 8 + r)[c];
      const uint32_t high = TRANSPOSED ? get(i * 8 + c + 1)[r] : get(i * 8 + r)[c + 1];
      four.v[i] = low | high << 16;
    }
    return four;
  });
  std::memcpy(to, got.v, sizeof to);
}
inline void load_matrices(uint32_t (&to)[4], const void* row) { load_matrices_either<false>(to, row); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) { load_matrices_either<true>(to, row); }

template <class T> void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Shown { float a[4][2], b[2][2]; } mine;
  struct Four { float v[4]; };
  for (int which = 0; which < 2; ++which) {
    for (int i = 0; i < 4; ++i) mine.a[i][which] = half_of<T>(a[i], which);
    mine.b[0][which] = half_of<T>(b0, which);
    mine.b[1][which] = half_of<T>(b1, which);
  }
  const Four sum = emulator::exchange(~0u, mine, [&](auto get) {
    const int l = emulator::lane();
    Four four{{d[0], d[1], d[2], d[3]}};
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, which = k % 2, high = k / 8;
      const Shown& left = get(l / 4 * 4 + holder);
      const Shown& first = get(l % 4 * 8 + holder);
      const Shown& second = get(l % 4 * 8 + 4 + holder);
      for (int i = 0; i < 4; ++i)
        four.v[i] += left.a[i / 2 + 2 * high][which] * (i % 2 ? second : first).b[high][which];
    }
    return four;
  });
  std::memcpy(d, sum.v, sizeof d);
}

inline void multiply_add_int8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Shown { uint32_t a[4], b[2]; };
  struct Four { int v[4]; };
  const Four sum = emulator::exchange(~0u, Shown{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](auto get) {
    const int l = emulator::lane();
    Four four{{d[0], d[1], d[2], d[3]}};
    for (int k = 0; k < 32; ++k) {
      const int holder = k % 16 / 4, shift = k % 4 * 8, high = k / 16;
      for (int i = 0; i < 4; ++i) {
        const uint32_t left = get(l / 4 * 4 + holder).a[i / 2 + 2 * high];
        const uint32_t right = get((l % 4 * 2 + i % 2) * 4 + holder).b[high];
        four.v[i] += static_cast<int8_t>(left >> shift) * static_cast<int8_t>(right >> shift);
      }
    }
    return four;
  });
  std::memcpy(d, sum.v, sizeof d);
}

inline int multiprocessors(int) { return 3; }
inline int shared_memory_limit(int) { return 227 << 10; }
// EMULATOR_CAPABILITY: 80 or 90, the default.
inline int compute_capability(int) {
  const char* set = std::getenv("EMULATOR_CAPABILITY");
  return set ? std::atoi(set) : 90;
}

struct Place {
  explicit Place(int device_index) : device(device_index) {}
  int device;
};

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 threads, int shared_bytes, const Place&, const Params& params) {
  emulator::launch([kernel, params] { kernel(params); }, grid, threads, static_cast<size_t>(shared_bytes));
}

// Emulated devices are of one process: memory is shown by its address.
constexpr int kHandleBytes = 64;
inline bool devices_linked(int, int) { return true; }
inline void* allocate_shown(int, size_t bytes, void* handle) {
  void* made = nullptr;
  if (posix_memalign(&made, 256, bytes)) std::abort();
  std::memset(made, 0, bytes);
  std::memcpy(handle, &made, sizeof made);
  return made;
}
inline void* open_shown(int, const void* handle) {
  void* opened = nullptr;
  std::memcpy(&opened, handle, sizeof opened);
  return opened;
}

}  // namespace cuda_ops

using std::max;
using std::min;
