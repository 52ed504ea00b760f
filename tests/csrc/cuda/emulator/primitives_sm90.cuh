// Stands in for csrc/cuda/primitives_sm90.cuh. Asynchronous copies and products happen when they are issued
// (EMULATOR_COPIES=early) or at the last moment that the program allows, when they are waited for (late).
#pragma once

#include <primitives.cuh>

namespace cuda_ops {

using PhaseBarrier = uint64_t;

struct TensorMap {
  const char* data;
  uint64_t sizes[4], strides[3];
  uint32_t box[4];
};

namespace sm90 {

struct Box {
  char* to;
  TensorMap from;
  int at[4];
};

struct Piece {
  void* to;
  const void* from;
  int bytes;
};

struct Phase {
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;  // that are still to come
  int number = 0;
  std::vector<Box> boxes;  // copies under way
  std::vector<Piece> pieces;
};

struct Product {
  std::function<void()> run;
  int group;
};

// Barriers of a block and products of its threads.
struct State {
  std::map<PhaseBarrier*, Phase> phases;
  std::map<int, std::vector<Product>> products;
  std::map<int, int> groups;
};

inline State& state() {
  if (!emulator::block->extension) emulator::block->extension = std::make_shared<State>();
  return *static_cast<State*>(emulator::block->extension.get());
}

// Calls function as if it ran in that block of this one's cluster, with what lies there where `at` lies here.
template <class At, class Function> void in_block(int rank, At* at, const Function& function) {
  emulator::Block* here = emulator::block;
  emulator::Block* there = emulator::block_of_cluster(rank);
  const auto offset = reinterpret_cast<unsigned char*>(at) - here->shared;
  emulator::block = there;
  function(reinterpret_cast<At*>(there->shared + offset));
  emulator::block = here;
}

inline Phase& phase(PhaseBarrier* barrier) {
  const auto found = state().phases.find(barrier);
  if (found == state().phases.end()) emulator::fail("uses a barrier that was not made");
  return found->second;
}

inline void advance(Phase& own) {
  if (own.missing < 0) emulator::fail("arrives at a barrier more often than it counts");
  if (own.missing || own.bytes) return;
  own.missing = own.arrivals;
  own.number++;
  emulator::block->events++;
}

inline char* swizzled(const char* at) {
  uintptr_t offset = at - reinterpret_cast<const char*>(emulator::block->shared);
  offset ^= (offset >> 7 & 7) << 4;
  return reinterpret_cast<char*>(emulator::block->shared) + offset;
}

inline void land(Phase& own, const Box& box) {
  const TensorMap& map = box.from;
  int64_t row = 0;
  for (uint32_t c3 = 0; c3 < map.box[3]; ++c3)
    for (uint32_t c2 = 0; c2 < map.box[2]; ++c2)
      for (uint32_t c1 = 0; c1 < map.box[1]; ++c1, ++row)
        for (uint32_t c0 = 0; c0 < map.box[0]; ++c0) {
          const int64_t at[4] = {box.at[0] + c0, box.at[1] + c1, box.at[2] + c2, box.at[3] + c3};
          bool inside = true;
          int64_t offset = at[0] * 2;
          for (int i = 0; i < 4; ++i) {
            inside &= at[i] >= 0 && at[i] < static_cast<int64_t>(map.sizes[i]);
            if (i) offset += at[i] * static_cast<int64_t>(map.strides[i - 1]);
          }
          uint16_t value = 0;
          if (inside) std::memcpy(&value, map.data + offset, 2);
          std::memcpy(swizzled(box.to + row * 128 + c0 * 2), &value, 2);
        }
  own.bytes -= row * map.box[0] * 2;
  advance(own);
}

inline void land(Phase& own, const Piece& piece) {
  std::memcpy(piece.to, piece.from, piece.bytes);
  own.bytes -= piece.bytes;
  advance(own);
}

}  // namespace sm90

inline void barrier_init(PhaseBarrier* barrier, int arrivals) {
  sm90::Phase made;
  made.arrivals = made.missing = arrivals;
  sm90::state().phases[barrier] = made;
}
inline void barrier_init_fence() {}
inline void barrier_arrive(PhaseBarrier* barrier) {
  sm90::Phase& own = sm90::phase(barrier);
  own.missing--;
  sm90::advance(own);
}
inline void barrier_arrive_expect(PhaseBarrier* barrier, int bytes) {
  sm90::Phase& own = sm90::phase(barrier);
  if (bytes < 0 || bytes >= 1 << 20) emulator::fail("a barrier does not count so many bytes");
  own.bytes += bytes;
  own.missing--;
  sm90::advance(own);
}
inline void barrier_wait(PhaseBarrier* barrier, int parity) {
  sm90::phase(barrier);
  emulator::wait_until(
      [barrier, parity] {
        sm90::Phase& own = sm90::phase(barrier);
        if (own.number % 2 == parity && !own.missing) {
          std::vector<sm90::Box> boxes;
          std::vector<sm90::Piece> pieces;
          boxes.swap(own.boxes);
          pieces.swap(own.pieces);
          for (const sm90::Box& box : boxes) sm90::land(own, box);
          for (const sm90::Piece& piece : pieces) sm90::land(own, piece);
        }
        return own.number % 2 != parity;
      },
      "barrier_wait");
}
inline void sync_some(int number, int threads) {
  emulator::arrive_and_wait(emulator::block->named[number], threads, "sync_some");
}

inline void copy_box(void* to, const TensorMap& from, PhaseBarrier* barrier, int c0, int c1, int c2, int c3) {
  const uintptr_t offset = static_cast<unsigned char*>(to) - emulator::block->shared;
  if (offset % 1024) emulator::fail("copy_box to an address that 1024 does not divide");
  sm90::Phase& own = sm90::phase(barrier);
  const sm90::Box box{static_cast<char*>(to), from, {c0, c1, c2, c3}};
  if (emulator::copies_land_early()) sm90::land(own, box);
  else own.boxes.push_back(box);
}
inline void copy_box_to_cluster(void* to, const TensorMap& from, PhaseBarrier* barrier, int c0, int c1, int c2, int c3) {
  const auto offset = static_cast<unsigned char*>(to) - emulator::block->shared;
  for (int rank = 0; rank < static_cast<int>(emulator::block->cluster->blocks.size()); ++rank)
    sm90::in_block(rank, barrier, [&](PhaseBarrier* there) {
      copy_box(emulator::block->shared + offset, from, there, c0, c1, c2, c3);
    });
}
inline void copy_bytes(void* to, const void* from, int bytes, PhaseBarrier* barrier) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16)
    emulator::fail("copy_bytes: 16 does not divide it");
  sm90::Phase& own = sm90::phase(barrier);
  const sm90::Piece piece{to, from, bytes};
  if (emulator::copies_land_early()) sm90::land(own, piece);
  else own.pieces.push_back(piece);
}
inline void fence_async() {}

inline int cluster_blocks() { return static_cast<int>(emulator::block->cluster->blocks.size()); }
inline int cluster_rank() { return emulator::block->rank; }
inline void cluster_sync() {
  emulator::Cluster& own = *emulator::block->cluster;
  emulator::arrive_and_wait(own.barrier, own.threads, "cluster_sync");
}
inline void barrier_arrive_at(PhaseBarrier* barrier, int rank) {
  sm90::in_block(rank, barrier, [](PhaseBarrier* there) { barrier_arrive(there); });
}

inline uint64_t describe_tile(const void* at, int leading, int stride) {
  const uint64_t offset = static_cast<const unsigned char*>(at) - emulator::block->shared;
  if (offset % 16 || leading % 16 || stride % 16) emulator::fail("describe_tile: 16 does not divide it");
  if (leading >> 18 || stride >> 18) emulator::fail("describe_tile: a step that 14 bits do not hold");
  // The field for another beginning of the swizzle's pattern, bits 49 to 51, is 0.
  if (offset >> 7 & 7) emulator::fail("describe_tile: not in the first of eight rows");
  return (offset & 0x3FFFF) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         static_cast<uint64_t>(1) << 62;
}

inline uint64_t further(uint64_t tile, int bytes) {
  if (bytes % 16) emulator::fail("further: 16 does not divide it");
  return tile + static_cast<uint64_t>(bytes >> 4);
}

inline void products_fence() { emulator::sync_warp(~0u); }
inline void products_commit() { sm90::state().groups[emulator::thread->number]++; }
template <int N> void products_wait() {
  sm90::State& state = sm90::state();
  const int number = emulator::thread->number, now = state.groups[number];
  std::erase_if(state.products[number], [&](const sm90::Product& product) {
    if (product.group >= now - N) return false;
    product.run();
    return true;
  });
  emulator::sync_warp(~0u);
}
template <int N> void products_wait(float value) {
  if (value < 0.0f) emulator::fail("products_wait of a negative value");
  products_wait<N>();
}
template <int N> void hold(float (&)[N][4]) {}

template <class T, int N, bool K_MAJOR>
void start_product(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  struct Shown { uint32_t a[4]; };
  struct Rows { float v[2][16]; };
  const Rows rows = emulator::exchange(~0u, Shown{{a[0], a[1], a[2], a[3]}}, [&](auto get) {
    Rows own;
    for (int k = 0; k < 16; ++k)
      for (int i = 0; i < 2; ++i)
        own.v[i][k] = half_of<T>(get(emulator::lane() / 4 * 4 + k % 8 / 2).a[i + k / 8 * 2], k % 2);
    return own;
  });
  const char* base = reinterpret_cast<const char*>(emulator::block->shared) + (b & 0x3FFF) * 16;
  const int64_t leading = (b >> 16 & 0x3FFF) * 16, stride = (b >> 32 & 0x3FFF) * 16;
  const int column = emulator::lane() % 4 * 2;
  float (*out)[4] = d;
  const auto run = [=] {
    for (int tile = 0; tile < N / 8; ++tile)
      for (int j = 0; j < 2; ++j) {
        const int n = tile * 8 + column + j;
        float sum[2] = {accumulate ? out[tile][j] : 0.0f, accumulate ? out[tile][2 + j] : 0.0f};
        for (int k = 0; k < 16; ++k) {
          const int64_t at = K_MAJOR ? n / 8 * stride + n % 8 * 128 + k * 2
                                     : n / 64 * leading + n % 64 * 2 + k / 8 * stride + k % 8 * 128;
          const float right = to_float(*reinterpret_cast<const T*>(sm90::swizzled(base + at)));
          for (int i = 0; i < 2; ++i) sum[i] += rows.v[i][k] * right;
        }
        out[tile][j] = sum[0];
        out[tile][2 + j] = sum[1];
      }
  };
  if (emulator::copies_land_early()) return run();
  sm90::State& state = sm90::state();
  const int number = emulator::thread->number;
  state.products[number].push_back({run, state.groups[number]});
}

// A value of a factor with k contiguous, as describe_tile has it.
inline float e4m3_of(uint64_t tile, int row, int k) {
  const char* base = reinterpret_cast<const char*>(emulator::block->shared) + (tile & 0x3FFF) * 16;
  const int64_t stride = (tile >> 32 & 0x3FFF) * 16;
  return e4m3_to_float(static_cast<uint8_t>(*sm90::swizzled(base + row / 8 * stride + row % 8 * 128 + k)));
}

template <int N> void start_product_e4m3(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) {
  emulator::sync_warp(~0u);
  const int number = emulator::thread->number, row = number % 128 / 32 * 16 + emulator::lane() / 4;
  const int column = emulator::lane() % 4 * 2;
  float (*out)[4] = d;
  const auto run = [=] {
    float left[2][32];
    for (int i = 0; i < 2; ++i)
      for (int k = 0; k < 32; ++k) left[i][k] = e4m3_of(a, row + 8 * i, k);
    for (int tile = 0; tile < N / 8; ++tile)
      for (int j = 0; j < 2; ++j) {
        float sum[2] = {accumulate ? out[tile][j] : 0.0f, accumulate ? out[tile][2 + j] : 0.0f};
        for (int k = 0; k < 32; ++k) {
          const float right = e4m3_of(b, tile * 8 + column + j, k);
          for (int i = 0; i < 2; ++i) sum[i] += left[i][k] * right;
        }
        out[tile][j] = sum[0];
        out[tile][2 + j] = sum[1];
      }
  };
  if (emulator::copies_land_early()) return run();
  sm90::State& state = sm90::state();
  state.products[number].push_back({run, state.groups[number]});
}

template <int N> void fewer_registers() {}
template <int N> void more_registers() {}

template <class Params>
void launch_clusters(void (*kernel)(Params), int blocks, dim3 grid, dim3 threads, int shared_bytes, const Place&,
                     const Params& params) {
  STD_TORCH_CHECK(blocks >= 1 && blocks <= emulator::kLargestCluster && grid.y % blocks == 0, "clusters of ", blocks);
  emulator::launch([kernel, params] { kernel(params); }, grid, threads, static_cast<size_t>(shared_bytes), blocks);
}

inline TensorMap tensor_map(const void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                            const uint32_t (&box)[4]) {
  TensorMap made{static_cast<const char*>(data), {}, {}, {}};
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[0] == 64, "tensor_map: what cuda would refuse");
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(box[i] >= 1 && box[i] <= 256, "tensor_map: a box of ", box[i]);
    STD_TORCH_CHECK(sizes[i] >= 1 && sizes[i] <= 1ull << 32, "tensor_map: a size of ", sizes[i]);
    made.sizes[i] = sizes[i];
    made.box[i] = box[i];
  }
  for (int i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(strides[i] % 16 == 0 && strides[i] < 1ull << 40, "tensor_map: a stride of ", strides[i], " bytes");
    made.strides[i] = strides[i];
  }
  return made;
}

}  // namespace cuda_ops
