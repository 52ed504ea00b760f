// Sums over the devices of one node, which read each other's memory over NVLink. Every rank adds up in the order of ranks,
// in float32, and rounds once: the bits are the same on every rank, in every run, by one step or by two.
//
// What a call is to do it knows from memory alone: calls are counted there, so that one can be captured in a graph and
// nothing is ever reset. Flags count up and have 64 bits: one that was left behind for years is still behind.
#pragma once

#include <primitives.cuh>

namespace cuda_ops {

constexpr int kPeers = 8;
constexpr int kPeerBlocks = 32;
constexpr int kPeerThreads = 512;

// At the beginning of each rank's memory, zero at first.
struct PeerState {
  uint64_t flags[kPeerBlocks][kPeers];  // [block][rank]: twice the number of a rank's call, and its step; written by it
  uint64_t calls;                       // of this rank, that are done
  int arrived;                          // blocks at the end of the call that is not; 0 between calls
};

constexpr int64_t kPeerStateBytes = 4096;
static_assert(sizeof(PeerState) <= kPeerStateBytes);

struct AllReduceParams {
  unsigned char* peers[kPeers];  // memory of each rank: PeerState, then two buffers of `room` bytes
  const void* x;                 // [count]
  void* out;                     // [count]
  int64_t count, room;           // elements; a multiple of 16, no less than the bytes of x
  int rank, ranks;
};

__device__ __forceinline__ PeerState* state_of(const AllReduceParams& p, int rank) {
  return reinterpret_cast<PeerState*>(p.peers[rank]);
}

// For all ranks' blocks of this number to come here, and what they wrote to be seen.
__device__ __forceinline__ void meet_peers(const AllReduceParams& p, uint64_t step) {
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < p.ranks) {
    set_flag(&state_of(p, threadIdx.x)->flags[blockIdx.x][p.rank], step);
    wait_flag(&state_of(p, p.rank)->flags[blockIdx.x][threadIdx.x], step);
  }
  __syncthreads();
}

template <class T> struct PeerVector {
  static constexpr int kSize = 16 / sizeof(T);
  union {
    uint4 bits;
    T values[kSize];
  };
  __device__ PeerVector() {}
};

// Vector i of the input, with zeros behind its end.
template <class T> __device__ __forceinline__ uint4 load_vector(const T* x, int64_t i, int64_t count) {
  constexpr int V = PeerVector<T>::kSize;
  if ((i + 1) * V <= count) return *reinterpret_cast<const uint4*>(x + i * V);
  PeerVector<T> v;
#pragma unroll
  for (int j = 0; j < V; ++j) v.values[j] = i * V + j < count ? x[i * V + j] : from_float<T>(0.0f);
  return v.bits;
}

template <class T> __device__ __forceinline__ void store_vector(T* out, int64_t i, int64_t count, const uint4& bits) {
  constexpr int V = PeerVector<T>::kSize;
  if ((i + 1) * V <= count) {
    *reinterpret_cast<uint4*>(out + i * V) = bits;
    return;
  }
  PeerVector<T> v;
  v.bits = bits;
#pragma unroll
  for (int j = 0; j < V; ++j)
    if (i * V + j < count) out[i * V + j] = v.values[j];
}

// The sum of what the ranks have at this place.
template <class T> __device__ __forceinline__ uint4 sum_of_peers(const AllReduceParams& p, int64_t at) {
  constexpr int V = PeerVector<T>::kSize;
  uint4 parts[kPeers] = {};
#pragma unroll
  for (int q = 0; q < kPeers; ++q)
    if (q < p.ranks) parts[q] = load_from_peer(p.peers[q] + at);
  float sums[V] = {};
#pragma unroll
  for (int q = 0; q < kPeers; ++q) {
    if (q >= p.ranks) continue;
    PeerVector<T> v;
    v.bits = parts[q];
#pragma unroll
    for (int j = 0; j < V; ++j) sums[j] = q ? add(sums[j], to_float(v.values[j])) : to_float(v.values[j]);
  }
  PeerVector<T> sum;
#pragma unroll
  for (int j = 0; j < V; ++j) sum.values[j] = from_float<T>(sums[j]);
  return sum.bits;
}

// Grid: up to kPeerBlocks, as many on every rank; block b needs what the ranks' blocks b wrote, and no others. Threads: 512.
// One step: every rank adds up everything, ranks - 1 times x over its links. Two: its slice, which the others fetch, which
// is 2 (ranks - 1) / ranks times x, and another wait.
//
// Calls take the two buffers in turn, so that none has to wait until all have read: who is in call n has met the others in
// call n - 1, which they began when they were done with n - 2, the last one that read this buffer.
template <class T, bool TWO_STEPS>
__global__ void __launch_bounds__(kPeerThreads) all_reduce_kernel(const __grid_constant__ AllReduceParams p) {
  constexpr int V = PeerVector<T>::kSize;
  PeerState* own = state_of(p, p.rank);
  const uint64_t call = load_shared_by_blocks(&own->calls) + 1;
  const int64_t buffer = kPeerStateBytes + static_cast<int64_t>(call % 2) * p.room;
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  const int64_t vectors = (p.count + V - 1) / V, slice = TWO_STEPS ? (vectors + p.ranks - 1) / p.ranks : vectors;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPeerThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kPeerThreads;

  for (int q = 0; q < (TWO_STEPS ? p.ranks : 1); ++q)
    for (int64_t i = first; i < slice && q * slice + i < vectors; i += stride) {
      const int64_t at = q * slice + i;
      *reinterpret_cast<uint4*>(p.peers[p.rank] + buffer + at * 16) = load_vector(x, at, p.count);
    }
  meet_peers(p, 2 * call);
  if constexpr (!TWO_STEPS) {
    for (int64_t i = first; i < vectors; i += stride)
      store_vector(out, i, p.count, sum_of_peers<T>(p, buffer + i * 16));
  } else {
    const int64_t start = p.rank * slice;
    for (int64_t i = first; i < slice && start + i < vectors; i += stride) {
      const int64_t at = buffer + (start + i) * 16;
      *reinterpret_cast<uint4*>(p.peers[p.rank] + at) = sum_of_peers<T>(p, at);  // nobody else reads this slice of its own
    }
    meet_peers(p, 2 * call + 1);
    for (int64_t i = first; i < slice; i += stride) {
      uint4 parts[kPeers] = {};
#pragma unroll
      for (int q = 0; q < kPeers; ++q)
        if (q < p.ranks && q * slice + i < vectors) parts[q] = load_from_peer(p.peers[q] + buffer + (q * slice + i) * 16);
#pragma unroll
      for (int q = 0; q < kPeers; ++q)
        if (q < p.ranks && q * slice + i < vectors) store_vector(out, q * slice + i, p.count, parts[q]);
    }
  }
  if (threadIdx.x == 0 && atomic_add(&own->arrived, 1) == static_cast<int>(gridDim.x) - 1) {
    own->arrived = 0;
    own->calls = call;  // every block has read it
  }
}

}  // namespace cuda_ops
