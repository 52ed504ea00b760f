// x @ weight.T for sm_90a, of weights that lie as product_kernel takes them: warpgroups unpack 64 output features to
// registers, as the left factor of products whose right one, as many columns as tokens, lies in shared memory. All
// copies are the tensor memory accelerator's. A weight's rows are read once for a tile of tokens; inputs, which weigh
// more than 4-bit weights from 32 tokens on, once for a cluster of blocks.
#pragma once

#include <primitives_sm90.cuh>

#include "product_formats.cuh"

namespace cuda_ops {

// WALKS: whether blocks of threads take all splits of a tile. They keep sums while they copy; others let go of stages.
template <int TOKENS, bool WALKS> struct ProductSm90Shape {
  static constexpr int kTeams = 2, kTeamThreads = 128;  // warpgroups: 128 output features, half of the columns
  static constexpr int kComputing = kTeams * kTeamThreads, kThreads = kComputing + 128;
  static constexpr int kCodeBytes = kProductRows * 64, kScaleBytes = 2048, kInputBytes = TOKENS * kChunkBytes;
  static constexpr int kStageBytes = kCodeBytes + kScaleBytes + 2 * kInputBytes;  // two chunks
  static constexpr int kStages = TOKENS <= 16 ? 7 : TOKENS <= 32 ? 5 : WALKS ? 3 : 4;  // of a team
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSumBytes = TOKENS * kProductRows * 4;
  // The second team's sums, then those of splits that went before, or the results. They may lie where its stages were.
  static constexpr int kSumsAt = WALKS ? kTeams * kRingBytes : kRingBytes;
  static constexpr int kBarriersAt = kTeams * kRingBytes + (WALKS ? 2 * kSumBytes : 0);
  static constexpr int kOutStride = kProductRows + 8;  // of results in shared memory, against bank conflicts
  static constexpr int kBarriers = kTeams * kStages;
  static constexpr int kSharedBytes = kBarriersAt + 2 * kBarriers * 8 + 16;  // two barriers a stage, is_last
  static_assert(kSharedBytes <= 227 * 1024 && TOKENS * kOutStride * 2 <= kSumBytes && 2 * kSumBytes <= kRingBytes);
};

struct ProductSm90Params {
  ProductParams product;
  TensorMap codes;   // [padded_out / 16, chunks * 4] rows of 128 bytes, in boxes of [8, 8]: 128 output features, two chunks
  TensorMap inputs;  // [num_tokens, in_features] in boxes of [TOKENS / blocks of a cluster, 64]
};

// The columns of a split, in chunks: the first team has those before `middle`, in whole stages.
struct SplitChunks {
  __device__ __forceinline__ SplitChunks(const ProductParams& p, int split) {
    begin = split * p.chunks_of_split;
    end = min(begin + p.chunks_of_split, p.num_chunks);
    middle = min(begin + (end - begin + 3) / 4 * 2, end);
  }
  int begin, middle, end;
};

// A place in a team's ring of stages, and the parity of the phase that its barriers are in.
template <class Shape> struct RingPlace {
  __device__ __forceinline__ RingPlace(int team)
      : first(team * Shape::kStages), at(first), bytes(first * Shape::kStageBytes) {}
  __device__ __forceinline__ void next() {
    const bool last = ++at == first + Shape::kStages;
    at = last ? first : at;
    bytes = last ? first * Shape::kStageBytes : bytes + Shape::kStageBytes;
    parity ^= last;
  }
  int first, at, bytes;
  int parity = 0;
};

// One thread: waits until a stage is free in all blocks of the cluster, and has two chunks copied to it: this block's codes
// and scales, and its part of the inputs, which goes to all. What lies past the end of the columns is copied as zeros, what
// lies past the team's is not used.
template <class Shape, int TOKENS>
__device__ __forceinline__ void copy_chunks(const ProductSm90Params& params, unsigned char* memory, PhaseBarrier* full,
                                            int first_split, int end_split) {
  constexpr int kGroupBytes = kProductRows * 4;  // of scales
  const ProductParams& p = params.product;
  const int part = TOKENS / cluster_blocks(), first_token = part * cluster_rank();
  const int groups = p.group_size == 32 ? 2 : 1, chunks_of_group = p.group_size > 64 ? p.group_size / 64 : 1;
  const unsigned char* scales = static_cast<const unsigned char*>(p.scales) + blockIdx.y * kGroupBytes;
  RingPlace<Shape> places[Shape::kTeams] = {{0}, {1}};
  const auto copy = [&](int team, int chunk, int end) {
    auto& place = places[team];
    PhaseBarrier* own = full + place.at;
    barrier_wait(own + Shape::kBarriers, place.parity ^ 1);  // it is empty
    const int chunks = min(2, end - chunk);
    barrier_arrive_expect(own, Shape::kCodeBytes + chunks * groups * kGroupBytes + 2 * Shape::kInputBytes);
    unsigned char* to = memory + place.bytes;
    copy_box(to, params.codes, own, 0, chunk * 4, blockIdx.y * (kProductRows / 16), 0);
    to += Shape::kCodeBytes;
    for (int i = 0; i < chunks * groups; ++i) {
      const int64_t group = groups == 2 ? 2 * chunk + i : (chunk + i) / chunks_of_group;
      copy_bytes(to + i * kGroupBytes, scales + group * p.padded_out * 4, kGroupBytes, own);
    }
    to += Shape::kScaleBytes + first_token * kChunkBytes;
    for (int i = 0; i < 2; ++i)
      copy_box_to_cluster(to + i * Shape::kInputBytes, params.inputs, own, (chunk + i) * 64,
                          blockIdx.x * TOKENS + first_token, 0, 0);
    place.next();
  };
  for (int split = first_split; split < end_split; ++split) {
    const SplitChunks chunks(p, split);
    for (int i = chunks.begin; i < chunks.middle; i += 2) {
      copy(0, i, chunks.middle);
      const int other = chunks.middle + i - chunks.begin;
      if (other < chunks.end) copy(1, other, chunks.end);
    }
  }
}

// A thread's sums: of two tiles of 64 output features, TOKENS / 8 columns each.
template <int TOKENS> using Sums = float[2][TOKENS / 8][4];

// sums += the products of chunks begin to end. Every group's sum is made by the tensor cores, and multiplied by its scale
// in float32. One tile's codes are unpacked while the other's products run. GROUPS: of a chunk.
template <class Shape, class Format, int TOKENS, int GROUPS>
__device__ __forceinline__ void multiply_chunks(Sums<TOKENS>& sums, const ProductParams& p, const unsigned char* memory,
                                                PhaseBarrier* full, RingPlace<Shape>& place, int begin, int end) {
  constexpr int kScalesOfTile = kProductRows / 2 * 4, kScalesOfGroup = kProductRows * 4, kCodesOfTile = Shape::kCodeBytes / 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % Shape::kTeamThreads / 32;
  const int line = (warp * 64 + lane) * 16;  // of codes in a stage; copied in rows of 128 bytes, swizzled
  const int codes_at = keep(line ^ (line >> 7 & 7) << 4), next_codes_at = keep((codes_at ^ 64) + 512);
  const int scales_at = keep(Shape::kCodeBytes + (warp * 16 + lane / 4) * 4);
  const int released = keep(lane < cluster_blocks() ? lane : -1);  // the block whose stage this lane releases
  const int chunks_of_group = p.group_size > 64 ? p.group_size / 64 : 1;
  int left = chunks_of_group - begin % chunks_of_group;  // chunks of the group
  Sums<TOKENS> part;
  typename Format::Row rows[2];
  bool first = true;  // of a group, or of these chunks
  const auto scale_part = [&](int i) {
    float scale[2];
    rows[i].scales(scale, p);
#pragma unroll
    for (int n = 0; n < TOKENS / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][n][j] += scale[j / 2] * part[i][n][j];
  };
  // The chunk whose codes, scales and inputs lie there; last: of these.
  const auto multiply_chunk = [&](const unsigned char* codes_from, const unsigned char* scales, uint64_t inputs, bool last) {
    const typename Format::Codes codes[2] = {{codes_from}, {codes_from + kCodesOfTile}};
#pragma unroll
    for (int half = 0; half < GROUPS; ++half) {
      constexpr int kSteps = 4 / GROUPS;
      uint32_t weights[2][kSteps][4];
      if (GROUPS == 2 || first) {
#pragma unroll
        for (int i = 0; i < 2; ++i) rows[i].load(scales + half * kScalesOfGroup + i * kScalesOfTile, 0);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) codes[i].fragment(weights[i][step], half * kSteps + step, rows[i]);
        products_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
          start_product<typename Format::T, TOKENS, true>(
              part[i], weights[i][step], further(inputs, (half * kSteps + step) * 32), step > 0 || (GROUPS == 1 && !first));
        products_commit();
      }
      if (half + 1 < GROUPS) {
        products_wait<0>();
        hold(part[0]);
        hold(part[1]);
        scale_part(0);
        scale_part(1);
      }
    }
    first = GROUPS == 2 || --left == 0 || last;
    if (first) {
      products_wait<1>();
      hold(part[0]);
      scale_part(0);
      products_wait<0>();
      hold(part[1]);
      scale_part(1);
      left = chunks_of_group;
    } else {
      products_wait<0>();
      hold(part[0]);
      hold(part[1]);
    }
  };
  for (int chunk = begin; chunk < end; chunk += 2) {
    const unsigned char* stage = memory + place.bytes;
    const uint64_t inputs = describe_tile(stage + Shape::kCodeBytes + Shape::kScaleBytes, 16, 1024);
    barrier_wait(full + place.at, place.parity);
    multiply_chunk(stage + codes_at, stage + scales_at, inputs, chunk + 1 == end);
    if (chunk + 1 < end)
      multiply_chunk(stage + next_codes_at, stage + scales_at + GROUPS * kScalesOfGroup, further(inputs, Shape::kInputBytes),
                     chunk + 2 == end);
    if (released >= 0) barrier_arrive_at(full + Shape::kBarriers + place.at, released);
    place.next();
  }
}

// Calls function(piece, four sums of this thread) for all of them.
template <int TOKENS, class Function> __device__ __forceinline__ void for_sums(Sums<TOKENS>& sums, const Function& function) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int n = 0; n < TOKENS / 8; ++n) function(i * (TOKENS / 8) + n, sums[i][n]);
}

__device__ __forceinline__ void add_to(float (&sums)[4], float4 other) {
  sums[0] += other.x, sums[1] += other.y, sums[2] += other.z, sums[3] += other.w;
}

// Adds up what all splits wrote of a tile, in order of their columns, if this block is the last of them to arrive; false
// if it is not. Threads of the first team, THREADS. partial: [splits, token tiles, row tiles, TOKENS / 4, THREADS], four
// sums of a thread together.
template <int TOKENS, int THREADS>
__device__ __forceinline__ bool join_splits(Sums<TOKENS>& sums, const ProductParams& p, int* is_last) {
  constexpr int kPieces = TOKENS / 4 * THREADS;
  const int tile = blockIdx.x * gridDim.y + blockIdx.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * gridDim.y * kPieces;
  float4* partial = static_cast<float4*>(p.partial) + static_cast<int64_t>(tile) * kPieces + threadIdx.x;
  for_sums<TOKENS>(sums, [&](int piece, float (&own)[4]) {
    partial[blockIdx.z * step + piece * THREADS] = float4{own[0], own[1], own[2], own[3]};
  });
  fence();
  sync_some(2, THREADS);
  if (threadIdx.x == 0) *is_last = atomic_add(p.arrived + tile, 1) == p.splits - 1;
  sync_some(2, THREADS);
  if (!*is_last) return false;
  fence();
  for_sums<TOKENS>(sums, [&](int piece, float (&own)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) own[j] = 0.0f;
    for (int split = 0; split < p.splits; ++split)
      add_to(own, load_shared_by_blocks(partial + split * step + piece * THREADS));
  });
  if (threadIdx.x == 0) p.arrived[tile] = 0;
  return true;
}

// Threads of the first team: a tile's sums and the bias, rounded, to where they belong. tile: [TOKENS, kOutStride].
template <class Shape, class T, int TOKENS>
__device__ __forceinline__ void store_tile(Sums<TOKENS>& sums, const ProductParams& p, T* tile) {
  const int lane = threadIdx.x % 32, first_row = blockIdx.y * kProductRows;
  const int own_row = threadIdx.x / 32 * 16 + lane / 4;
  for_sums<TOKENS>(sums, [&](int piece, const float (&own)[4]) {
    const int token = piece % (TOKENS / 8) * 8 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = piece / (TOKENS / 8) * 64 + own_row + j / 2 * 8;
      float value = own[j];
      if (p.bias && first_row + row < p.out_features)
        value = add(value, to_float(static_cast<const T*>(p.bias)[first_row + row]));
      tile[(token + j % 2) * Shape::kOutStride + row] = from_float<T>(value);
    }
  });
  sync_some(2, Shape::kTeamThreads);
  const int first_token = blockIdx.x * TOKENS, tokens = min(TOKENS, p.num_tokens - first_token);
  const bool whole = p.out_features % 8 == 0;  // pieces of 16 bytes; `out` begins where 16 bytes do
  for (int i = threadIdx.x; i < tokens * (kProductRows / 8); i += Shape::kTeamThreads) {
    const int token = i / (kProductRows / 8), row = i % (kProductRows / 8) * 8;
    const T* from = tile + token * Shape::kOutStride + row;
    T* to = static_cast<T*>(p.out) + static_cast<int64_t>(first_token + token) * p.out_features + first_row + row;
    const int count = min(8, p.out_features - first_row - row);
    if (whole && count == 8) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int j = 0; j < count; ++j) to[j] = from[j];
    }
  }
}

// Grid: (token tiles, row tiles, splits, or 1 where blocks take all splits of a tile), in clusters of neighbouring row tiles.
// Threads: two warpgroups that compute, the teams, and one of which a thread copies. Shared memory: ProductSm90Shape. The
// first half of a split's columns and the second are summed apart, and added; splits are added in order of their columns,
// by whichever blocks. So a token's bits depend on the weight's shape and the device alone.
template <class Format, int TOKENS, int GROUPS, bool WALKS>
__global__ void __launch_bounds__(ProductSm90Shape<TOKENS, WALKS>::kThreads, 1)
    product_sm90_kernel(const __grid_constant__ ProductSm90Params params) {
  using Shape = ProductSm90Shape<TOKENS, WALKS>;
  using T = typename Format::T;
  constexpr int kThreads = Shape::kTeamThreads;
  const ProductParams& p = params.product;
  unsigned char* memory = shared_memory();
  PhaseBarrier* full = reinterpret_cast<PhaseBarrier*>(memory + Shape::kBarriersAt);
  int* is_last = reinterpret_cast<int*>(full + 2 * Shape::kBarriers);
  const int first_split = WALKS ? 0 : blockIdx.z, end_split = WALKS ? p.splits : first_split + 1;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kBarriers; ++i) {
      barrier_init(full + i, 1);
      barrier_init(full + Shape::kBarriers + i, kThreads / 32 * cluster_blocks());
    }
    barrier_init_fence();
  }
  cluster_sync();
  if (threadIdx.x >= Shape::kComputing) {
    fewer_registers<40>();
    if (threadIdx.x == Shape::kComputing) copy_chunks<Shape, TOKENS>(params, memory, full, first_split, end_split);
  } else {
    more_registers<232>();
    const int team = uniform(threadIdx.x / kThreads), own = threadIdx.x % kThreads;
    float4* of_team = reinterpret_cast<float4*>(memory + Shape::kSumsAt) + own;
    float4* totals = of_team + TOKENS / 4 * kThreads;
    const auto sync = [] { sync_some(1, Shape::kComputing); };
    RingPlace<Shape> place(team);
    Sums<TOKENS> sums;
    for (int split = first_split; split < end_split; ++split) {
      const SplitChunks chunks(p, split);
      for_sums<TOKENS>(sums, [](int, float (&four)[4]) { four[0] = four[1] = four[2] = four[3] = 0.0f; });
      multiply_chunks<Shape, Format, TOKENS, GROUPS>(sums, p, memory, full, place, team ? chunks.middle : chunks.begin,
                                                     team ? chunks.end : chunks.middle);
      if (team) {
        if (!WALKS) sync_some(3, kThreads);  // the whole team is done with its stages
        for_sums<TOKENS>(sums, [&](int piece, const float (&four)[4]) {
          of_team[piece * kThreads] = float4{four[0], four[1], four[2], four[3]};
        });
      }
      sync();
      if (!team) {
        for_sums<TOKENS>(sums, [&](int piece, float (&four)[4]) {
          add_to(four, of_team[piece * kThreads]);
          if (!WALKS) return;
          add_to(four, split ? totals[piece * kThreads] : float4{});
          if (split + 1 < end_split) totals[piece * kThreads] = float4{four[0], four[1], four[2], four[3]};
        });
      }
      if (split + 1 < end_split) sync();  // of_team is free again
    }
    if (!team && (gridDim.z == 1 || join_splits<TOKENS, kThreads>(sums, p, is_last))) {
      sync_some(2, kThreads);  // all have read their totals
      store_tile<Shape, T, TOKENS>(sums, p, reinterpret_cast<T*>(totals - own));
    }
  }
  __syncwarp();
  cluster_sync();  // no block ends while others may arrive at its barriers
}

}  // namespace cuda_ops
