// What sm_90a has besides: products of a group of 4 warps straight out of shared memory, copies of tiles by the tensor
// memory accelerator, barriers that count bytes. PTX ISA, sections "Asynchronous warpgroup level matrix instructions",
// "Tensor" of "Data Movement", "mbarrier". As primitives.cuh, it has a stand-in for tests on the processor.
#pragma once

#include <cuda.h>

#include <primitives.cuh>

#include <initializer_list>

namespace cuda_ops {

// ---- barriers in shared memory ----

using PhaseBarrier = uint64_t;

__device__ __forceinline__ void barrier_init(PhaseBarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes barriers that were just made visible to asynchronous copies. Before __syncthreads().
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(PhaseBarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}
// Arrives, and has the phase last until this many bytes more have been copied.
__device__ __forceinline__ void barrier_arrive_expect(PhaseBarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is over; phases count from 0.
__device__ __forceinline__ void barrier_wait(PhaseBarrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" :: "r"(shared_address(barrier)), "r"(parity) : "memory");
}

// ---- clusters: blocks of threads that run at the same time and reach each other's shared memory ----

__device__ __forceinline__ int cluster_blocks() {
  uint32_t count;
  asm("mov.u32 %0, %%cluster_nctaid.y;" : "=r"(count));
  return static_cast<int>(count);
}
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctaid.y;" : "=r"(rank));
  return static_cast<int>(rank);
}
// __syncthreads of all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// Arrives at the barrier that lies at the same place of that block of the cluster: for what was read before, since
// nothing that was written would be seen there.
__device__ __forceinline__ void barrier_arrive_at(PhaseBarrier* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" :: "r"(shared_address(barrier)), "r"(rank) : "memory");
}

// __syncthreads of `threads` threads; numbers 1 to 15.
__device__ __forceinline__ void sync_some(int number, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(number), "r"(threads) : "memory");
}

// ---- tensor memory accelerator ----

// A tensor of 16-bit values with up to 4 dimensions in global memory, and the box that a copy takes of it.
struct TensorMap {
  CUtensorMap map;
};

// Starts the copy of the box at these coordinates, the innermost dimension first; `barrier` gets its bytes. What lies
// outside the tensor becomes 0. Rows of 128 bytes are swizzled: of an address in shared memory, bits 7 to 9 are added
// without carry to bits 4 to 6. `to`: 1024 bytes divide it.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& from, PhaseBarrier* barrier, int c0, int c1, int c2,
                                         int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      :: "r"(shared_address(to)), "l"(&from.map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// The same, to the same place of the shared memory of every block of the cluster; each block's own barrier gets the bytes.
__device__ __forceinline__ void copy_box_to_cluster(void* to, const TensorMap& from, PhaseBarrier* barrier, int c0, int c1,
                                                    int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
      :: "r"(shared_address(to)), "l"(&from.map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
         "h"(static_cast<uint16_t>((1u << cluster_blocks()) - 1))
      : "memory");
}

// Starts a copy of contiguous bytes to shared memory; 16 divides both addresses and the size. `barrier` gets the bytes.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes, PhaseBarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// Makes what this thread wrote to shared memory visible to copies and products that run asynchronously.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- products of a warpgroup ----

// A factor in shared memory, in rows of 128 bytes swizzled as copy_box leaves them, as instructions name it.
// Keys of products, k, and columns, n, lie at (CUTLASS, cute/arch/mma_sm90_desc.hpp and atom/mma_traits_sm90_gmma.hpp)
//   k contiguous: (n / 8) * stride + (n % 8) * 128 + 2 * k
//   n contiguous: (n / 64) * leading + (n % 64) * 2 + (k / 8) * stride + (k % 8) * 128
__device__ __forceinline__ uint64_t describe_tile(const void* at, int leading, int stride) {
  return static_cast<uint64_t>((shared_address(at) & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}
// The same tile, so many bytes further on in its rows.
__device__ __forceinline__ uint64_t further(uint64_t tile, int bytes) {
  return (tile & ~0xFFFFFFFFull) | (static_cast<uint32_t>(tile) + static_cast<uint32_t>(bytes >> 4));
}

// Before the first product, and after registers that products use were written.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}
// The same, but not before `value` is known, which is never negative: ptxas moves waits up to the products, past
// arithmetic that was to run beside them (seen in 13.0). It does not move them past the store that never happens here.
template <int N> __device__ __forceinline__ void products_wait(float value) {
  asm volatile(
      "{\n"
      ".reg .pred negative;\n"
      "setp.lt.f32 negative, %1, 0f00000000;\n"
      "@negative st.volatile.shared.f32 [%2], %1;\n"
      "wgmma.wait_group.sync.aligned %0;\n"
      "}\n" :: "n"(N), "f"(value), "r"(0) : "memory");
}

// Keeps the compiler from moving uses of registers across a wait or a fence.
template <int N> __device__ __forceinline__ void hold(float (&d)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i]) :: "memory");
}

// d = a b, or d += a b with `accumulate`, for a of 64x16 and b of 16xN. Warp w of the group has rows 16 w to 16 w + 15 of
// a and d, in registers as multiply_add has them: d[n] is of columns 8 n to 8 n + 7. K_MAJOR: k contiguous in b.
template <class T, int N, bool K_MAJOR>
__device__ __forceinline__ void start_product(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate);

#define CUDA_OPS_F(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define CUDA_OPS_F8(n) \
  CUDA_OPS_F(n), CUDA_OPS_F(n + 1), CUDA_OPS_F(n + 2), CUDA_OPS_F(n + 3), CUDA_OPS_F(n + 4), CUDA_OPS_F(n + 5), \
      CUDA_OPS_F(n + 6), CUDA_OPS_F(n + 7)
#define CUDA_OPS_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CUDA_OPS_R16 CUDA_OPS_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define CUDA_OPS_R32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
  "%25, %26, %27, %28, %29, %30, %31"
#define CUDA_OPS_R64 \
  CUDA_OPS_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CUDA_OPS_PRODUCT(TYPE, NAME, K_MAJOR, TRANSPOSED)                                                             \
  template <>                                                                                                         \
  __device__ __forceinline__ void start_product<TYPE, 64, K_MAJOR>(float (&d)[8][4], const uint32_t (&a)[4],          \
                                                                   uint64_t b, bool accumulate) {                     \
    asm volatile(                                                                                                     \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                                  \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" CUDA_OPS_R32                                 \
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, " TRANSPOSED ";\n}\n"                                                 \
        : CUDA_OPS_F8(0)                                                                                              \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));                     \
  }                                                                                                                   \
  template <>                                                                                                         \
  __device__ __forceinline__ void start_product<TYPE, 128, K_MAJOR>(float (&d)[16][4], const uint32_t (&a)[4],        \
                                                                    uint64_t b, bool accumulate) {                    \
    asm volatile(                                                                                                     \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                                  \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {" CUDA_OPS_R64                                \
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, " TRANSPOSED ";\n}\n"                                                 \
        : CUDA_OPS_F8(0), CUDA_OPS_F8(8)                                                                              \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));                     \
  }
CUDA_OPS_PRODUCT(bf16, "bf16", true, "0")
CUDA_OPS_PRODUCT(bf16, "bf16", false, "1")
CUDA_OPS_PRODUCT(fp16, "f16", true, "0")
CUDA_OPS_PRODUCT(fp16, "f16", false, "1")
#undef CUDA_OPS_PRODUCT
#define CUDA_OPS_PRODUCT(TYPE, NAME)                                                                                   \
  template <>                                                                                                         \
  __device__ __forceinline__ void start_product<TYPE, 16, true>(float (&d)[2][4], const uint32_t (&a)[4], uint64_t b, \
                                                                bool accumulate) {                                    \
    asm volatile(                                                                                                     \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"                                                                  \
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." NAME "." NAME " {" CUDA_OPS_R8                                  \
        "}, {%8, %9, %10, %11}, %12, p, 1, 1, 0;\n}\n"                                                                \
        : CUDA_OPS_F(0), CUDA_OPS_F(1)                                                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));                     \
  }                                                                                                                   \
  template <>                                                                                                         \
  __device__ __forceinline__ void start_product<TYPE, 32, true>(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b, \
                                                                bool accumulate) {                                    \
    asm volatile(                                                                                                     \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"                                                                  \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." NAME "." NAME " {" CUDA_OPS_R16                                 \
        "}, {%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}\n"                                                              \
        : CUDA_OPS_F(0), CUDA_OPS_F(1), CUDA_OPS_F(2), CUDA_OPS_F(3)                                                  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));                     \
  }
CUDA_OPS_PRODUCT(bf16, "bf16")
CUDA_OPS_PRODUCT(fp16, "f16")
#undef CUDA_OPS_PRODUCT

// The same of 8-bit floats, E4M3, for a of 64x32 and b of 32xN, both in shared memory with k contiguous: a as
// describe_tile has b, its rows for columns.
template <int N>
__device__ __forceinline__ void start_product_e4m3(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate);

template <>
__device__ __forceinline__ void start_product_e4m3<16>(float (&d)[2][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {" CUDA_OPS_R8 "}, %8, %9, p, 1, 1;\n}\n"
      : CUDA_OPS_F(0), CUDA_OPS_F(1) : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
template <>
__device__ __forceinline__ void start_product_e4m3<64>(float (&d)[8][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" CUDA_OPS_R32 "}, %32, %33, p, 1, 1;\n}\n"
      : CUDA_OPS_F8(0) : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
template <>
__device__ __forceinline__ void start_product_e4m3<128>(float (&d)[16][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" CUDA_OPS_R64 "}, %64, %65, p, 1, 1;\n}\n"
      : CUDA_OPS_F8(0), CUDA_OPS_F8(8) : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
#undef CUDA_OPS_R8
#undef CUDA_OPS_R16
#undef CUDA_OPS_F
#undef CUDA_OPS_F8
#undef CUDA_OPS_R32
#undef CUDA_OPS_R64

// Registers that each thread of a warpgroup has from here on.
template <int N> __device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N));
}
template <int N> __device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N));
}

// ---- host ----

// A launch of clusters of so many blocks along y, which divides the grid's.
template <class Params>
void launch_clusters(void (*kernel)(Params), int blocks, dim3 grid, dim3 threads, int shared_bytes, const Place& place,
                     const Params& params) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             shared_bytes),
        "shared memory of a kernel");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = 1, cluster.val.clusterDim.y = static_cast<unsigned>(blocks), cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(place.stream);
  config.attrs = &cluster, config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, params), "launch");
}

// sizes: of the dimensions, the innermost first. strides: bytes from one index to the next of dimensions 1 to 3.
// box: of a copy, its innermost dimension 64 values of 16 bits.
inline TensorMap tensor_map(const void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                            const uint32_t (&box)[4]) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
        "cuTensorMapEncodeTiled");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result),
        "cuTensorMapEncodeTiled");
#endif
  STD_TORCH_CHECK(found != nullptr && result == cudaDriverEntryPointSuccess,
                  "the driver has no cuTensorMapEncodeTiled; expected one for CUDA 12 or later");
  TensorMap made{};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult error = reinterpret_cast<Encode>(found)(
      &made.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data),
      reinterpret_cast<const cuuint64_t*>(sizes), reinterpret_cast<const cuuint64_t*>(strides), box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(error == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", static_cast<int>(error));
  return made;
}

}  // namespace cuda_ops
