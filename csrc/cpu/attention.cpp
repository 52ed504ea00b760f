// The ops paged_attention and quantized_attention: checks, cut the batch into tiles of query rows, run them on torch's
// own threads.
// Layouts are those of engines/ops/attention.py and engines/ops/kv_cache.py.

#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "buffer.h"
#include "codes_tensors.h"
#include "isa.h"
#include "tensors.h"

namespace cpu_ops {

Kernel kernel(bool packed) {
#if defined(CPU_OPS_X86)
  if (packed) return amx::attend;
  if (isa() >= Isa::avx512) return avx512::attend;
  if (isa() == Isa::avx2) return avx2::attend;
#endif
  STD_TORCH_CHECK(!packed, "packed: this machine has no matrix unit");
  return baseline::attend;
}

Kernel kernel_of_codes(Type type, Codes codes) {
#if defined(CPU_OPS_X86)
  // Numbers of 16 bits, as the matrix unit's products of integers have them.
  if (isa() == Isa::amx && type != Type::f32 && codes != Codes::fp8) return amx::attend_codes;
#endif
  return kernel(false);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const int32_t* int32s(const Tensor& tensor, const char* name, int64_t dim) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.dim() == dim && tensor.is_contiguous(), name,
                  ": expected a contiguous int32 tensor of ", dim, " dimensions");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// Tensors of a call, as pointers and sizes.
struct Call {
  Type type;
  bool packed;
  int64_t num_seqs, num_heads, num_kv_heads, group, head_dim, max_blocks, block_size;
  int64_t element, q_token_stride, q_head_stride;
  const char* q;
  char* out;
  const int32_t *starts, *seq_lens, *tables;
  const float* sinks;
  Work common;  // what all tiles have alike; k and v of KV head 0
  int64_t k_head_stride, v_head_stride, scales_head_stride;
  std::vector<int64_t> shared;     // per sequence: its leading keys that its prefix group attends to
  std::vector<int64_t> slot;       // per sequence: its place in states, -1 for none
  Buffer states;
  int64_t state_floats = 0;
};

// One tile to compute: rows [first, last) of a sequence, or of a prefix group (row r: member r / group).
struct Item {
  const int32_t* members;  // null: the sequence `seq`
  int64_t seq, shared, kv_head, first, last, cost;
};

bool few_rows(const Item& item) { return item.last - item.first <= kLaneRows; }

void fill_row(const Call& call, Work& work, int64_t r, int64_t seq, int64_t token, int64_t position, int64_t head) {
  work.q[r] = call.q + (token * call.q_token_stride + head * call.q_head_stride) * call.element;
  work.out[r] = call.out + (token * call.num_heads + head) * call.head_dim * call.element;
  work.position[r] = position;
  work.sink[r] = call.sinks ? call.sinks[head] : 0.0f;
  work.state[r] = call.slot[seq] < 0 ? nullptr
                                     : call.states.get() + (call.slot[seq] * call.num_heads + head) * call.state_floats;
}

void fill(const Call& call, const Item& item, Work& work) {
  work.num_rows = static_cast<int>(item.last - item.first);
  work.k = call.common.k + item.kv_head * call.k_head_stride;
  work.v = call.common.v + item.kv_head * call.v_head_stride;
  if (work.codes != Codes::none) {
    work.k_scales = call.common.k_scales + item.kv_head * call.scales_head_stride;
    work.v_scales = call.common.v_scales + item.kv_head * call.scales_head_stride;
  }
  work.block_table = call.tables + (item.members ? item.members[0] : item.seq) * call.max_blocks;
  work.store_state = item.members != nullptr;
  int64_t lowest = INT64_MAX, highest = 0;
  for (int64_t r = 0; r < work.num_rows; ++r) {
    const int64_t row = item.first + r, head = item.kv_head * call.group + row % call.group, n = row / call.group;
    const int64_t seq = item.members ? item.members[n] : item.seq;
    const int64_t begin = call.starts[seq], end = call.starts[seq + 1], token = item.members ? begin : begin + n;
    const int64_t position = call.seq_lens[seq] - end + token;
    fill_row(call, work, r, seq, token, position, head);
    lowest = std::min(lowest, position);
    highest = std::max(highest, position);
  }
  const int64_t in_window = work.window ? std::max<int64_t>(0, lowest - work.window + 1) / kTile * kTile : 0;
  work.begin = item.members ? in_window : std::max(call.shared[item.seq], in_window);
  work.end = item.members ? item.shared : highest + 1;
}

// Asks for an item's first tile, which lies anywhere: for kernels that do not look ahead themselves.
void prefetch(const Work& work) {
  const int64_t bytes = std::min<int64_t>(work.block_size, kTile) * work.k_slot_stride;
  for (int64_t key = work.begin; key < std::min(work.end, work.begin + kTile); key += work.block_size) {
    const int64_t block = work.block_table[key / work.block_size];
    for (int64_t i = 0; i < bytes; i += 64) {
      __builtin_prefetch(work.k + block * work.k_block_stride + i, 0, 2);
      __builtin_prefetch(work.v + block * work.v_block_stride + i, 0, 2);
    }
  }
}

// A thread's next items: where few rows read many keys, several go on side by side and hide each other's latencies.
struct Turn {
  size_t first, count;
};

std::vector<Turn> turns(const std::vector<Item>& items, int64_t threads) {
  const size_t fair = std::max<size_t>(1, items.size() / (4 * threads)), most = std::min<size_t>(fair, kLanes);
  std::vector<Turn> turns;
  for (size_t first = 0, count; first < items.size(); first += count) {
    count = 1;
    while (count < most && first + count < items.size() && few_rows(items[first]) && few_rows(items[first + count])) ++count;
    turns.push_back({first, count});
  }
  return turns;
}

// Takes items in turn, the longest first, on as many threads as torch has: which thread computes what changes no bit.
void run_all(const Call& call, std::vector<Item>& items) {
  if (items.empty()) return;
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  const Codes codes = call.common.codes;
  const Kernel attend = codes == Codes::none ? kernel(call.packed) : kernel_of_codes(call.type, codes);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(items.size()));
  const std::vector<Turn> order = turns(items, threads);
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch = floats(scratch_floats(call.head_dim));
    std::vector<Work> room(2 * kLanes, call.common);
    Work *now = room.data(), *ahead = now + kLanes;
    const auto prepare = [&](size_t turn, Work* works) {
      if (turn >= order.size()) return;
      for (size_t i = 0; i < order[turn].count; ++i) {
        fill(call, items[order[turn].first + i], works[i]);
        if (!call.packed) prefetch(works[i]);
      }
    };
    size_t turn = next.fetch_add(1);
    for (prepare(turn, now); turn < order.size(); std::swap(now, ahead)) {
      const size_t coming = next.fetch_add(1);
      prepare(coming, ahead);
      const int num_ahead = coming < order.size() ? static_cast<int>(order[coming].count) : 0;
      attend(now, static_cast<int>(order[turn].count), ahead, num_ahead, scratch.get());
      turn = coming;
    }
  });
}

// A whole number of tokens, and of tiles for few threads: every tile's keys are read again.
int64_t rows_per_item(int64_t group) { return std::max<int64_t>(1, kRows / group) * group; }

void add_items(std::vector<Item>& items, const Call& call, Item item, int64_t rows, int64_t keys) {
  const int64_t step = std::min<int64_t>(kRows, rows_per_item(call.group));
  for (item.kv_head = 0; item.kv_head < call.num_kv_heads; ++item.kv_head)
    for (item.first = 0; item.first < rows; item.first = item.last) {
      item.last = std::min(rows, item.first + step);
      // A tile costs its rows, and about 16 rows more for reading and converting what they share.
      item.cost = (item.last - item.first + 16) * keys;
      items.push_back(item);
    }
}

// First the keys that groups share, each once for all members, to states; then every sequence from where that ended.
void attend_groups(Call& call, const int32_t* seqs, int64_t num_seqs, const int32_t* groups, int64_t num_groups) {
  std::vector<Item> items;
  int64_t slots = 0, first = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t members = groups[2 * g];
    // Whole tiles only, so that sums are made as they would be without the group.
    const int64_t shared = groups[2 * g + 1] * call.block_size / kTile * kTile;
    STD_TORCH_CHECK(first + members <= num_seqs, "prefix_groups: more members than group_seqs has");
    if (shared > 0 && members > 1) {
      for (int64_t i = first; i < first + members; ++i) {
        const int32_t seq = seqs[i];
        STD_TORCH_CHECK(seq >= 0 && seq < call.num_seqs && call.slot[seq] < 0 &&
                            call.starts[seq + 1] - call.starts[seq] == 1 && shared <= call.seq_lens[seq],
                        "prefix_groups: sequence ", seq,
                        "; expected one that decodes one token, is longer than the prefix and in one group only");
        call.slot[seq] = slots++;
        call.shared[seq] = shared;
      }
      add_items(items, call, Item{seqs + first, 0, shared, 0, 0, 0, 0}, members * call.group, shared);
    }
    first += members;
  }
  call.state_floats = kStateHeader + (call.head_dim + 63) / 64 * 64;
  call.states = floats(slots * call.num_heads * call.state_floats);
  run_all(call, items);
}

void attend_sequences(const Call& call) {
  std::vector<Item> items;
  for (int64_t seq = 0; seq < call.num_seqs; ++seq) {
    const int64_t count = call.starts[seq + 1] - call.starts[seq];
    const int64_t keys = call.seq_lens[seq] - call.shared[seq] + 1;
    add_items(items, call, Item{nullptr, seq, 0, 0, 0, 0, 0}, count * call.group, keys);
  }
  run_all(call, items);
}

void check_cache(const Tensor& q, const Tensor& cache, const char* name) {
  STD_TORCH_CHECK(cache.scalar_type() == q.scalar_type() && cache.dim() == 4 && cache.size(3) == q.size(2) &&
                      cache.stride(3) == 1,
                  name, ": expected [num_blocks, num_kv_heads, block_size, head_dim] of q's dtype and head_dim");
}

// Where keys and values lie. element: bytes of one of their numbers, or codes.
void set_cache(Call& call, const Tensor& q, const Tensor& k, const Tensor& v, int64_t element) {
  call.num_heads = q.size(1);
  call.num_kv_heads = k.size(1);
  STD_TORCH_CHECK(v.size(1) == k.size(1) && v.size(2) == k.size(2) && call.num_heads % call.num_kv_heads == 0,
                  "q: ", call.num_heads, " heads; expected a multiple of the cache's ", call.num_kv_heads);
  call.block_size = k.size(2);
  Work& work = call.common;
  work.k = static_cast<const char*>(k.const_data_ptr());
  work.v = static_cast<const char*>(v.const_data_ptr());
  work.k_block_stride = k.stride(0) * element;
  work.k_slot_stride = k.stride(2) * element;
  work.v_block_stride = v.stride(0) * element;
  work.v_slot_stride = v.stride(2) * element;
  call.k_head_stride = k.stride(1) * element;
  call.v_head_stride = v.stride(1) * element;
  work.block_size = call.block_size;
}

// The batch's sequences: engines/batch.py.
void set_batch(Call& call, const Tensor& q, const Tensor& cu_seqlens_q, const Tensor& seq_lens,
               const Tensor& block_tables) {
  call.num_seqs = seq_lens.size(0);
  call.starts = int32s(cu_seqlens_q, "cu_seqlens_q", 1);
  call.seq_lens = int32s(seq_lens, "seq_lens", 1);
  call.tables = int32s(block_tables, "block_tables", 2);
  call.max_blocks = block_tables.size(1);
  STD_TORCH_CHECK(cu_seqlens_q.size(0) == call.num_seqs + 1 && block_tables.size(0) == call.num_seqs &&
                      call.starts[0] == 0 && call.starts[call.num_seqs] == q.size(0),
                  "cu_seqlens_q: expected num_seqs + 1 offsets from 0 to q's tokens, and as many block_tables");
  for (int64_t i = 0; i < call.num_seqs; ++i) {
    const int64_t count = call.starts[i + 1] - call.starts[i];
    STD_TORCH_CHECK(count >= 0 && call.seq_lens[i] >= count && call.seq_lens[i] <= call.max_blocks * call.block_size,
                    "seq_lens: sequence ", i, " has ", call.seq_lens[i],
                    " tokens; expected at least its new ones and no more than its block table holds");
  }
  call.shared.assign(call.num_seqs, 0);
  call.slot.assign(call.num_seqs, -1);
}

// What the ops take besides q and the cache.
struct Options {
  const Tensor &cu_seqlens_q, &seq_lens, &block_tables;
  const std::optional<Tensor>&group_seqs, &groups, &sinks;
  double softmax_scale;
  int64_t window_size;
  double softcap;
};

// call: of which the cache is known.
Tensor attend(Call& call, const Tensor& q, const Options& options) {
  STD_TORCH_CHECK(options.softmax_scale > 0, "softmax_scale: ", options.softmax_scale, "; expected more than 0");
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  set_batch(call, q, options.cu_seqlens_q, options.seq_lens, options.block_tables);
  call.group = call.num_heads / call.num_kv_heads;
  call.head_dim = q.size(2);
  call.element = size_of(call.type);
  call.q_token_stride = q.stride(0);
  call.q_head_stride = q.stride(1);
  call.q = static_cast<const char*>(q.const_data_ptr());
  call.out = static_cast<char*>(out.mutable_data_ptr());
  if (options.sinks) {
    STD_TORCH_CHECK(options.sinks->scalar_type() == ScalarType::Float && options.sinks->numel() == call.num_heads &&
                        options.sinks->is_contiguous(),
                    "sinks: expected one float32 a head");
    call.sinks = static_cast<const float*>(options.sinks->const_data_ptr());
  }
  Work& work = call.common;
  work.type = call.type;
  work.head_dim = static_cast<int>(call.head_dim);
  work.has_sinks = call.sinks != nullptr;
  work.window = options.window_size;
  work.scale = static_cast<float>(options.softmax_scale);
  work.softcap = static_cast<float>(options.softcap);
  if (options.group_seqs && options.groups)
    attend_groups(call, int32s(*options.group_seqs, "group_seqs", 1), options.group_seqs->size(0),
                  int32s(*options.groups, "groups", 2), options.groups->size(0));
  attend_sequences(call);
  return out;
}

void check_q(const Tensor& q) {
  STD_TORCH_CHECK(q.dim() == 3 && (q.stride(2) == 1 || q.size(2) == 1),
                  "q: expected [num_tokens, num_heads, head_dim], the last dimension contiguous");
}

Tensor paged_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                       const Tensor& seq_lens, const Tensor& block_tables, const std::optional<Tensor>& group_seqs,
                       const std::optional<Tensor>& groups, const std::optional<Tensor>& sinks, double softmax_scale,
                       int64_t window_size, double softcap, bool packed) {
  check_q(q);
  check_cache(q, k, "cache.k");
  check_cache(q, v, "cache.v");
  Call call{};
  call.type = type_of(q, "q");
  call.packed = packed;
  STD_TORCH_CHECK(!packed || (isa() == Isa::amx && call.type == Type::bf16 && k.is_contiguous() && v.is_contiguous() &&
                              q.size(2) % 32 == 0 && k.size(2) % 32 == 0),
                  "packed: expected bfloat16, head_dim and block_size multiples of 32, and a machine with AMX");
  set_cache(call, q, k, v, size_of(call.type));
  return attend(call, q, {cu_seqlens_q, seq_lens, block_tables, group_seqs, groups, sinks, softmax_scale, window_size,
                          softcap});
}

Tensor quantized_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_scales,
                           const Tensor& v_scales, int64_t kind, const Tensor& cu_seqlens_q, const Tensor& seq_lens,
                           const Tensor& block_tables, const std::optional<Tensor>& group_seqs,
                           const std::optional<Tensor>& groups, const std::optional<Tensor>& sinks,
                           double softmax_scale, int64_t window_size, double softcap) {
  check_q(q);
  Call call{};
  call.type = type_of(q, "q");
  Work& work = call.common;
  work.codes = codes_of(kind);
  STD_TORCH_CHECK(k.dim() == 4, "cache.k: expected 4 dimensions");
  check_codes(k, k_scales, work.codes, k.size(1), q.size(2), "cache.k");
  check_codes(v, v_scales, work.codes, k.size(1), q.size(2), "cache.v");
  STD_TORCH_CHECK(v.size(0) == k.size(0), "cache.v: expected as many blocks as cache.k");
  set_cache(call, q, k, v, 1);
  work.k_scales = static_cast<const float*>(k_scales.const_data_ptr());
  work.v_scales = static_cast<const float*>(v_scales.const_data_ptr());
  work.scales_block_stride = k_scales.stride(0);
  work.scales_slot_stride = k_scales.stride(2);
  call.scales_head_stride = k_scales.stride(1);
  return attend(call, q, {cu_seqlens_q, seq_lens, block_tables, group_seqs, groups, sinks, softmax_scale, window_size,
                          softcap});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) {
  library.def(
      "paged_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor seq_lens, Tensor block_tables, "
      "Tensor? group_seqs, Tensor? groups, Tensor? sinks, float softmax_scale, int window_size, float softcap, "
      "bool packed) -> Tensor");
  library.def(
      "quantized_attention(Tensor q, Tensor k, Tensor v, Tensor k_scales, Tensor v_scales, int kind, "
      "Tensor cu_seqlens_q, Tensor seq_lens, Tensor block_tables, Tensor? group_seqs, Tensor? groups, Tensor? sinks, "
      "float softmax_scale, int window_size, float softcap) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) {
  library.impl("paged_attention", TORCH_BOX(&paged_attention));
  library.impl("quantized_attention", TORCH_BOX(&quantized_attention));
}

}  // namespace cpu_ops
