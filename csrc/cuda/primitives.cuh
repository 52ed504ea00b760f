// What kernels ask of the hardware, each thing under one name. Kernels include this by <primitives.cuh> and reach the
// hardware in no other way, so that a header of the same name, found first, can stand in for it: tests run every kernel
// on the processor (tests/csrc/cuda/emulator).
//
// Instructions: PTX ISA, sections "Warp Level Matrix Multiply-Accumulate" and "Data Movement: Asynchronous Copy".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <utility>

// Weak, so that the library loads beside a torch without CUDA, which lacks it; nothing calls it there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

#define CUDA_OPS_DISPATCH_KEY CUDA

namespace cuda_ops {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// ---- numbers ----

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ fp16 from_float<fp16>(float x) { return __float2half_rn(x); }

// Two values rounded to T in one register, the first in the low half.
template <class T> __device__ __forceinline__ uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <> __device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(uint32_t x) { return __uint_as_float(x); }

// 2^x to two units of the last place, 0 for -infinity.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float half_bits_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// Of both halves of registers that hold two values of T.
template <class T> __device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b);
template <> __device__ __forceinline__ uint32_t subtract_pairs<bf16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 d = __hsub2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(d);
}
template <> __device__ __forceinline__ uint32_t subtract_pairs<fp16>(uint32_t a, uint32_t b) {
  const __half2 d = __hsub2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(d);
}

template <class T> __device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b);
template <> __device__ __forceinline__ uint32_t multiply_pairs<bf16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 d = __hmul2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(d);
}
template <> __device__ __forceinline__ uint32_t multiply_pairs<fp16>(uint32_t a, uint32_t b) {
  const __half2 d = __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(d);
}

// Two values rounded to E4M3 in the lower half, the first in the low byte; at most 448 in magnitude, NaN stays NaN.
__device__ __forceinline__ uint32_t pack_e4m3(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(float2{low, high}, __NV_SATFINITE, __NV_E4M3);
}

// Bytes 0 to 3 of the result are those of a (0 to 3) and b (4 to 7) that the four lowest digits to the base 16 name.
__device__ __forceinline__ uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t which) {
  return __byte_perm(a, b, which);
}

// (x & mask) | bits and (~x & mask) | bits in one instruction: where two of them are constants the compiler makes two.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}
__device__ __forceinline__ uint32_t not_and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xAE;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}

// x, which the compiler has to keep: it makes sums of indices anew in every step of a loop, though registers are free.
// A warp together.
__device__ __forceinline__ int keep(int x) {
  return __shfl_sync(~0u, x, threadIdx.x % 32);
}

// x, the same in all lanes of a warp: the compiler then keeps it, and what is made of it, once for the warp.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// a * b and a + b as they are written: no fused multiply-add.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }

// ---- memory ----

// The block's shared memory, as many bytes as the launch gave, aligned to 1024.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes that nobody reads again: past the first-level cache.
__device__ __forceinline__ uint4 load_streaming(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

// Starts a copy of 16 bytes into shared memory; zeros where `valid` is false, and then nothing is read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// The same for 4 or 8 bytes, which goes by the first-level cache.
template <int BYTES> __device__ __forceinline__ void copy_async_short(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               :: "r"(shared_address(to)), "l"(from), "n"(BYTES), "r"(valid ? BYTES : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's latest groups are under way.
template <int N> __device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// The value before, with all that this thread's block wrote before visible to who sees the new one.
__device__ __forceinline__ int atomic_add(int* at, int value) { return atomicAdd(at, value); }
__device__ __forceinline__ void fence() { __threadfence(); }
// Reads what other blocks wrote, past the first-level cache.
__device__ __forceinline__ float load_shared_by_blocks(const float* from) { return __ldcg(from); }
__device__ __forceinline__ int load_shared_by_blocks(const int* from) { return __ldcg(from); }
__device__ __forceinline__ uint64_t load_shared_by_blocks(const uint64_t* from) {
  return __ldcg(reinterpret_cast<const unsigned long long*>(from));
}
__device__ __forceinline__ float4 load_shared_by_blocks(const float4* from) { return __ldcg(from); }

// ---- memory of other devices ----

// Sets a flag on any device, after all that this thread's block wrote before its last barrier.
__device__ __forceinline__ void set_flag(uint64_t* at, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" :: "l"(at), "l"(value) : "memory");
}
// Waits until a flag is this high. What was written before it was set can be read from then on, by the whole block after
// its next barrier.
__device__ __forceinline__ void wait_flag(const uint64_t* at, uint64_t value) {
  uint64_t seen;
  do asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(seen) : "l"(at) : "memory");
  while (seen < value);
}
// 16 bytes of any device's memory, past the caches that do not hear of its writes.
__device__ __forceinline__ uint4 load_from_peer(const void* from) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
  return v;
}

// ---- tensor cores ----

// Four 8x8 matrices of 16-bit values: lane l gives the address of row l % 8 of matrix l / 8, and gets of matrix i
// the values 2 * (l % 4) and the next of row l / 4, in to[i].
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}
// The same of the transposed matrices.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

// d += a b for a of 16x16 and b of 16x8, 16-bit values, sums in float32. Lane l has
//   a[i]: row l / 4 + 8 * (i % 2), columns 2 * (l % 4) + 8 * (i / 2) and the next
//   b[i]: rows 2 * (l % 4) + 8 * i and the next, column l / 4
//   d[i]: row l / 4 + 8 * (i / 2), column 2 * (l % 4) + i % 2
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a b for a of 16x32 and b of 32x8, signed 8-bit integers, exact unless int32 overflows. As above, four values in a
// register: columns 4 * (l % 4) + 16 * (i / 2) and the next of a, rows 4 * (l % 4) + 16 * i and the next of b.
__device__ __forceinline__ void multiply_add_int8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- host ----

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  return count;
}

inline int shared_memory_limit(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return bytes;
}

inline int compute_capability(int device) {
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  return major * 10;
}

// Where a launch goes: a device, made the current one, and torch's stream on it.
struct Place {
  explicit Place(int device_index) : device(device_index), guard(device_index) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  }
  int device;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 threads, int shared_bytes, const Place& place,
            const Params& params) {
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes),
          "shared memory of a kernel");
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(place.stream)>>>(params);
  check(cudaGetLastError(), "launch");
}

// ---- host: memory that processes show each other ----

constexpr int kHandleBytes = sizeof(cudaIpcMemHandle_t);

// Whether both devices of this process reach each other's memory over NVLink: other links have no atomic operations.
inline bool devices_linked(int device, int other) {
  for (const auto& [from, to] : {std::pair(device, other), std::pair(other, device)}) {
    int access = 0, atomics = 0;
    check(cudaDeviceCanAccessPeer(&access, from, to), "access to another device");
    if (!access) return false;
    check(cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, from, to), "link to another device");
    if (!atomics) return false;
  }
  return true;
}

// Zeros on a device, and what other processes open them by.
inline void* allocate_shown(int device, size_t bytes, void* handle) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* made = nullptr;
  check(cudaMalloc(&made, bytes), "memory for other devices");
  check(cudaMemset(made, 0, bytes), "memory for other devices");
  check(cudaDeviceSynchronize(), "memory for other devices");
  check(cudaIpcGetMemHandle(static_cast<cudaIpcMemHandle_t*>(handle), made), "handle of memory for other devices");
  return made;
}

inline void* open_shown(int device, const void* handle) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* opened = nullptr;
  check(cudaIpcOpenMemHandle(&opened, *static_cast<const cudaIpcMemHandle_t*>(handle), cudaIpcMemLazyEnablePeerAccess),
        "memory of another device");
  return opened;
}

}  // namespace cuda_ops
