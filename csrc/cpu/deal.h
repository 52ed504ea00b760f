// Parts of a product, dealt out among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

namespace cpu_ops {

inline int64_t ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
  void operator()(char* p) const { std::free(p); }
};

// Memory of one thread, aligned for tiles.
class Room {
 public:
  explicit Room(int64_t bytes) : at_(static_cast<char*>(std::aligned_alloc(64, ceil(bytes, 64) * 64))) {
    STD_TORCH_CHECK(at_ != nullptr, "out of memory");
  }
  char* get() const { return at_.get(); }

 private:
  std::unique_ptr<char, Free> at_;
};

// Calls what(i, room) for each i below count, dealt out among threads as they come for more.
template <class What> void deal(int64_t count, int64_t room_bytes, const What& what) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const Room room(room_bytes);
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) what(i, room.get());
  });
}

// Rows in chunks of about the same size, at most so many, and as many as every thread gets the same of.
struct Chunks {
  int64_t rows, size, count;

  Chunks(int64_t rows_, int64_t most, int64_t threads) : rows(rows_) {
    const int64_t wanted = ceil(ceil(rows, most / 32 * 32), threads) * threads;
    size = ceil(ceil(rows, wanted), 32) * 32;
    count = ceil(rows, size);
  }
  int64_t first(int64_t i) const { return i * size; }
  int64_t last(int64_t i) const { return std::min(rows, (i + 1) * size); }
};

}  // namespace cpu_ops
