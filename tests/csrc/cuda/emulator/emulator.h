// Runs the source of a CUDA kernel on the processor: one fiber a thread, a few blocks at a time, with the meaning that
// barriers, shuffles and asynchronous copies have on the GPU.
//
// What is unspecified there varies here, so that a result that depends on it shows:
//   EMULATOR_ORDER  forward, reverse, random:<seed> (threads resume in this order), warp:<seed> (warps run as far as they
//                   can, and most of them wait meanwhile), lag:<seed> (the same, but that a few warps only run when no
//                   others can); blocks run in this order too
//   EMULATOR_COPIES late (an asynchronous copy lands when it is waited for), early (at once)
// Shared memory has exactly the size that was launched with, on the heap, and starts as NaN. A barrier that not all
// threads reach ends the process with the name of what they wait for.
//
// A launch runs to its end, unless a queue was chosen (queues.cu): those of several devices wait for emulator_run, and run
// side by side then, each queue in its order; in the orders random and warp some fall asleep for a while.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) float4 { float x, y, z, w; };

namespace emulator {

extern "C" void emulator_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.weak emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int kSavedRegisters = 6;
#else
#error "emulator: write emulator_switch for this processor"
#endif

constexpr size_t kStackBytes = 256 << 10;

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
  bool valid;
};

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Thread {
  void* stack_pointer = nullptr;
  dim3 index;
  int number = 0;
  bool done = false;
  const char* waits_for = nullptr;
  std::function<bool()> ready;  // when waits_for is set
  std::vector<Copy> copies;
  int copy_group = 0;
};

struct Warp {
  alignas(16) unsigned char slots[32][128];
  bool lags = false;
  std::map<uint32_t, Barrier> barriers;
};

struct Block;

// Blocks that run at the same time and reach each other's shared memory.
struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
  int threads = 0;
};

struct Block {
  dim3 index, grid, size;
  std::shared_ptr<Cluster> cluster;
  int rank = 0;  // in it
  const std::function<void()>* body = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  std::map<int, Barrier> named;
  int alive = 0;
  std::shared_ptr<void> extension;  // what other headers keep of a block
  uint64_t events = 0;
  unsigned char* shared = nullptr;
};

inline Block* block = nullptr;
inline Thread* thread = nullptr;
inline void* scheduler_stack = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: block (%u, %u, %u) thread %d: %s\n", block->index.x, block->index.y, block->index.z,
               thread ? thread->number : -1, what);
  std::abort();
}

inline void yield() { emulator_switch(&thread->stack_pointer, scheduler_stack); }

inline void wait_until(std::function<bool()> ready, const char* what) {
  block->events++;
  if (ready()) return;
  thread->ready = std::move(ready);
  thread->waits_for = what;
  yield();
  thread->waits_for = nullptr;
}

inline void release(Barrier& barrier) {
  barrier.arrived = 0;
  barrier.generation++;
  block->events++;
}

inline void arrive_and_wait(Barrier& barrier, int count, const char* what) {
  if (++barrier.arrived == count) return release(barrier);
  const uint64_t generation = barrier.generation;
  wait_until([&barrier, generation] { return barrier.generation != generation; }, what);
}

// The block of this one's cluster, whose memory is there as long as it runs.
inline Block* block_of_cluster(int rank) {
  Block* other = block->cluster->blocks.at(rank);
  if (!other->alive) fail("reaches for a block of its cluster that has ended");
  return other;
}

inline void sync_block() { arrive_and_wait(block->barrier, block->alive, "__syncthreads"); }

inline Warp& warp() { return block->warps[thread->number / 32]; }
inline int lane() { return thread->number % 32; }

inline void sync_warp(uint32_t mask) {
  if (!(mask >> lane() & 1)) fail("a lane is not in the mask that it gives");
  arrive_and_wait(warp().barriers[mask], std::popcount(mask), "a warp's barrier or exchange");
}

// Every lane of the mask shows `value`; `pick` makes this lane's result of what the others show.
template <class T, class Pick> auto exchange(uint32_t mask, const T& value, const Pick& pick) {
  static_assert(sizeof(T) <= sizeof(Warp::slots[0]));
  Warp& own = warp();
  std::memcpy(own.slots[lane()], &value, sizeof(T));
  sync_warp(mask);
  const auto result = pick([&](int other) -> const T& {
    if (!(mask >> other & 1)) fail("reads a lane that is not in the mask");
    return *reinterpret_cast<const T*>(own.slots[other]);
  });
  sync_warp(mask);
  return result;
}

inline void land(const Copy& copy) {
  if (copy.valid) std::memcpy(copy.to, copy.from, copy.bytes);
  else std::memset(copy.to, 0, copy.bytes);
}

inline bool copies_land_early() {
  const char* set = std::getenv("EMULATOR_COPIES");
  return set && std::string(set) == "early";
}

inline void entry() {
  (*block->body)();
  thread->done = true;
  block->events++;
  if (--block->alive && block->barrier.arrived == block->alive) release(block->barrier);
  yield();
  std::abort();
}

class Order {
 public:
  Order() {
    const char* set = std::getenv("EMULATOR_ORDER");
    const std::string text = set ? set : "forward";
    const size_t colon = text.find(':');
    name_ = text.substr(0, colon);
    if (colon != std::string::npos) random_.seed(std::atoi(text.c_str() + colon + 1));
    if (name_ != "forward" && name_ != "reverse" && name_ != "random" && name_ != "warp" && name_ != "lag") {
      std::fprintf(stderr, "EMULATOR_ORDER: %s; expected forward, reverse or one of random, warp, lag:<seed>\n", set);
      std::abort();
    }
  }
  bool warps_run_ahead() const { return name_ == "warp" || name_ == "lag"; }
  // Whether a warp of a block that begins is to wait for all others.
  bool lags() { return name_ == "lag" && random_() % 16 == 0; }
  // Whether a thread or warp loses its turn, so that others get far ahead of it.
  bool passes_over() { return name_ == "warp" && random_() % 4 != 0; }
  // For how many turns of the others a device does nothing; 0 but for one time in so many.
  int sleep(int times) {
    const bool sleeps = (name_ == "random" || warps_run_ahead()) && static_cast<int>(random_() % times) == 0;
    return sleeps ? static_cast<int>(random_() % 64) : 0;
  }
  std::vector<int> of(int count) {
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (name_ == "reverse") std::reverse(order.begin(), order.end());
    if (name_ == "random" || warps_run_ahead()) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

 private:
  std::string name_;
  std::mt19937 random_;
};

inline unsigned char* stack(int number) {
  static std::vector<unsigned char*> stacks;
  while (static_cast<int>(stacks.size()) <= number)
    stacks.push_back(static_cast<unsigned char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
  return stacks[number];
}

inline void prepare(Thread& own, int number, int stack_number, dim3 size) {
  own.number = number;
  own.index = dim3(number % size.x, number / size.x % size.y, number / (size.x * size.y));
  void** pointer = reinterpret_cast<void**>(stack(stack_number) + kStackBytes - 64);
  *--pointer = nullptr;
  *--pointer = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--pointer = nullptr;
  own.stack_pointer = pointer;
}

inline bool resume(int number) {
  Thread& own = block->threads[number];
  if (own.done || (own.waits_for && !own.ready())) return false;
  thread = &own;
  emulator_switch(&scheduler_stack, own.stack_pointer);
  return true;
}

using Running = std::vector<Block*>;

// A turn for every thread, or for every warp as far as it can go; in the order `warp`, unless it is for `all`, only for some
// of them. Whether anything happened.
inline bool sweep(Order& order, const Running& running, bool all) {
  const int step = order.warps_run_ahead() ? 32 : 1;
  std::vector<std::pair<Block*, int>> units;
  uint64_t before = 0, after = 0;
  for (Block* own : running) {
    before += own->events;
    for (int i = 0; i < static_cast<int>(own->threads.size()); i += step) units.emplace_back(own, i);
  }
  for (int at : order.of(static_cast<int>(units.size()))) {
    if (!all && order.passes_over()) continue;
    block = units[at].first;
    const int first = units[at].second;
    if (!all && block->warps[first / 32].lags) continue;
    const int end = std::min(first + step, static_cast<int>(block->threads.size()));
    for (bool moved = true; moved;) {
      moved = false;
      for (int i = first; i < end; ++i) moved |= resume(i) && step > 1;
    }
  }
  for (Block* own : running) after += own->events;
  return before != after;
}

[[noreturn]] inline void fail_deadlocked() {
  for (Thread& own : block->threads)
    if (!own.done)
      std::fprintf(stderr, "emulator: thread %d waits in %s\n", own.number, own.waits_for ? own.waits_for : "?");
  thread = nullptr;
  fail("no thread can go on");
}

constexpr int kConcurrentBlocks = 3, kConcurrentClusters = 2, kLargestCluster = 4;
constexpr int kSlots = kConcurrentClusters * kLargestCluster;  // of stacks that a launch may use

struct Launch {
  std::function<void()> kernel;
  dim3 grid, size;
  size_t dynamic;   // bytes of shared memory, as a launch gives them
  int cluster = 1;  // blocks of one, along y
};

// A launch on its way. Its blocks' threads have the stacks from `slot` on.
class Progress {
 public:
  Progress(Launch launch, Order& order, int slot)
      : launch_(std::move(launch)), order_(order), slot_(slot),
        clusters_(order.of(launch_.grid.x * launch_.grid.y * launch_.grid.z / launch_.cluster)),
        running_(launch_.cluster > 1 ? kConcurrentClusters : kConcurrentBlocks) {}

  // The blocks that are to run now; none when all have.
  Running running() {
    Running found;
    for (size_t i = 0; i < running_.size(); ++i) {
      auto& own = running_[i];
      if (std::none_of(own.begin(), own.end(), [](const auto& one) { return one->alive > 0; })) {
        for (const auto& one : own) std::free(one->shared);
        own.clear();
        if (next_ < clusters_.size()) own = start(clusters_[next_++], slot_ + static_cast<int>(i) * launch_.cluster);
      }
      for (const auto& one : own)
        if (one->alive) found.push_back(one.get());
    }
    return found;
  }

 private:
  using Blocks = std::vector<std::unique_ptr<Block>>;

  // The blocks of a cluster. Of the grid's y, clusters have as many neighbours as they have blocks.
  Blocks start(int at, int slot) {
    const dim3 grid = launch_.grid;
    const int rows = grid.y / launch_.cluster;
    Blocks made;
    const auto cluster = std::make_shared<Cluster>();
    for (int rank = 0; rank < launch_.cluster; ++rank) {
      const unsigned y = at / grid.x % rows * launch_.cluster + rank;
      made.push_back(start_block(dim3(at % grid.x, y, at / (grid.x * rows)), slot + rank));
      made.back()->cluster = cluster;
      made.back()->rank = rank;
      cluster->blocks.push_back(made.back().get());
      cluster->threads += made.back()->alive;
    }
    return made;
  }

  std::unique_ptr<Block> start_block(dim3 index, int slot) {
    auto own = std::make_unique<Block>();
    own->index = index;
    own->grid = launch_.grid;
    own->size = launch_.size;
    own->body = &launch_.kernel;
    own->threads.resize(own->size.x * own->size.y * own->size.z);
    own->alive = static_cast<int>(own->threads.size());
    own->warps.resize((own->alive + 31) / 32);
    for (Warp& warp : own->warps) warp.lags = order_.lags();
    // Aligned as the GPU's, and ending where the allocation ends, so that a sanitizer sees the first byte past it.
    void* aligned = nullptr;
    if (posix_memalign(&aligned, 1024, std::max<size_t>(launch_.dynamic, 1))) std::abort();
    own->shared = static_cast<unsigned char*>(aligned);
    std::memset(own->shared, 0xFF, std::max<size_t>(launch_.dynamic, 1));
    for (int i = 0; i < own->alive; ++i) prepare(own->threads[i], i, slot * 1024 + i, own->size);
    return own;
  }

  Launch launch_;
  Order& order_;
  int slot_;
  std::vector<int> clusters_;
  size_t next_ = 0;
  std::vector<Blocks> running_;
};

inline std::vector<std::deque<Launch>> queues;
inline int queue = -1;  // that launches go to; -1: they run at once

inline void launch(std::function<void()> kernel, dim3 grid, dim3 size, size_t dynamic, int cluster = 1) {
  Launch made{std::move(kernel), grid, size, dynamic, cluster};
  if (queue >= 0) return queues[queue].push_back(std::move(made));
  Order order;
  Progress own(std::move(made), order, 0);
  for (Running running = own.running(); !running.empty(); running = own.running()) {
    if (sweep(order, running, false) || sweep(order, running, true)) continue;
    block = running.back();
    fail_deadlocked();
  }
  block = nullptr;
  thread = nullptr;
}

// All that lies in the queues.
inline void run_queues() {
  Order order;
  const int count = static_cast<int>(queues.size());
  std::vector<std::unique_ptr<Progress>> launches(count);
  std::vector<int> asleep(count);
  for (;;) {
    Running all, awake;
    for (int i = 0; i < count; ++i) {
      Running own = launches[i] ? launches[i]->running() : Running();
      if (own.empty() && !queues[i].empty()) {
        launches[i] = std::make_unique<Progress>(std::move(queues[i].front()), order, i * kSlots);
        queues[i].pop_front();
        asleep[i] = order.sleep(4);
        own = launches[i]->running();
      }
      all.insert(all.end(), own.begin(), own.end());
      if (!asleep[i]) asleep[i] = order.sleep(32);
      if (asleep[i]) asleep[i]--;
      else awake.insert(awake.end(), own.begin(), own.end());
    }
    if (all.empty()) break;
    if (sweep(order, awake, false) || sweep(order, all, true)) continue;
    block = all.back();
    fail_deadlocked();
  }
  block = nullptr;
  thread = nullptr;
}

}  // namespace emulator

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emulator::thread->index)
#define blockIdx (emulator::block->index)
#define blockDim (emulator::block->size)
#define gridDim (emulator::block->grid)

inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::sync_warp(mask); }

template <class T> T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  return emulator::exchange(mask, value, [&](auto get) -> T {
    return get((emulator::lane() & ~(width - 1)) | (from & (width - 1)));
  });
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int by) {
  return emulator::exchange(mask, value, [&](auto get) -> T { return get(emulator::lane() ^ by); });
}
template <class T> T __shfl_up_sync(unsigned mask, T value, int by) {
  return emulator::exchange(mask, value, [&](auto get) -> T {
    return get(emulator::lane() >= by ? emulator::lane() - by : emulator::lane());
  });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulator::exchange(mask, predicate != 0, [&](auto get) -> unsigned {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1 && get(i)) result |= 1u << i;
    return result;
  });
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(unsigned x) { return std::countl_zero(x); }
inline int __ffs(unsigned x) { return x ? std::countr_zero(x) + 1 : 0; }
