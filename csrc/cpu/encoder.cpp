// The op encoder_attention: each sequence is one block of keys and values that all its rows see, for the kernels of
// paged attention. Layouts are those of engines/ops/attention.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "isa.h"
#include "packed.h"
#include "tensors.h"

namespace cpu_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor [num_tokens, num_heads, head_dim]; strides in bytes.
struct Heads {
  const char* data;
  int64_t token_stride, head_stride;
  const char* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

// Some heads of one sequence.
struct Item {
  int64_t begin, length, head, num_heads;
};

struct Call {
  Heads q, k, v, out;
  Work common;
  int64_t element;
  bool packs;

  // Bytes that the keys, and as many that the values, of one head take when they are packed.
  int64_t packed_bytes(int64_t length) const {
    return packs ? (length + kPackedValues - 1) / kPackedValues * kPackedValues * common.head_dim * 2 : 0;
  }
};

Heads heads_of(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && like.dim() == 3 && (x.stride(2) == 1 || x.size(2) <= 1) &&
                      x.scalar_type() == like.scalar_type() && x.size(0) == like.size(0) &&
                      x.size(1) == like.size(1) && x.size(2) == like.size(2),
                  name, ": expected [num_tokens, num_heads, head_dim] like q, the last dimension contiguous");
  const int64_t element = size_of(type_of(x, name));
  return {static_cast<const char*>(x.const_data_ptr()), x.stride(0) * element, x.stride(1) * element};
}

// Short texts go several heads at a time: where few rows read few keys, these hide each other's latencies.
std::vector<Item> items_of(const int32_t* starts, int64_t num_seqs, int64_t num_heads) {
  std::vector<Item> items;
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    const int64_t length = starts[seq + 1] - starts[seq], step = length <= kLaneRows ? kLanes : 1;
    if (length == 0) continue;
    for (int64_t head = 0; head < num_heads; head += step)
      items.push_back({starts[seq], length, head, std::min(step, num_heads - head)});
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.length > b.length; });
  return items;
}

// What all rows of one head have alike; its keys and values packed into `room` where the kernel wants them so.
void fill_head(const Call& call, const Item& item, int64_t head, char* room, Work& work) {
  static constexpr int32_t kFirstBlock = 0;
  work.block_table = &kFirstBlock;
  work.end = item.length;
  work.block_size = item.length;
  work.k = call.k.at(item.begin, head);
  work.v = call.v.at(item.begin, head);
#if defined(CPU_OPS_X86)
  if (call.packs) {
    const int64_t bytes = call.packed_bytes(item.length);
    amx::pack_keys(room, work.k, call.k.token_stride, item.length, work.head_dim);
    amx::pack_values(room + bytes, work.v, call.v.token_stride, item.length, work.head_dim);
    work.k = room;
    work.v = room + bytes;
    work.block_size = bytes / (2 * work.head_dim);
  }
#endif
}

void fill_rows(const Call& call, const Item& item, int64_t head, int64_t first, Work& work) {
  work.num_rows = static_cast<int>(std::min<int64_t>(kRows, item.length - first));
  for (int r = 0; r < work.num_rows; ++r) {
    work.q[r] = call.q.at(item.begin + first + r, head);
    work.out[r] = const_cast<char*>(call.out.at(item.begin + first + r, head));
    work.position[r] = item.length - 1;  // of the last key that the row sees
    work.state[r] = nullptr;
  }
}

void attend_item(const Call& call, Kernel attend, const Item& item, char* room, Work* works, float* scratch) {
  for (int64_t i = 0; i < item.num_heads; ++i)
    fill_head(call, item, item.head + i, room + i * 2 * call.packed_bytes(item.length), works[i]);
  for (int64_t first = 0; first < item.length; first += kRows) {
    for (int64_t i = 0; i < item.num_heads; ++i) fill_rows(call, item, item.head + i, first, works[i]);
    attend(works, static_cast<int>(item.num_heads), nullptr, 0, scratch);
  }
}

Tensor encoder_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                         double softmax_scale) {
  STD_TORCH_CHECK(softmax_scale > 0, "softmax_scale: ", softmax_scale, "; expected more than 0");
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Call call{heads_of(q, q, "q"), heads_of(k, q, "k"), heads_of(v, q, "v"), heads_of(out, q, "out"), {}, 0, false};
  const Type type = type_of(q, "q");
  call.element = size_of(type);
  call.packs = isa() == Isa::amx && type == Type::bf16 && q.size(2) % 32 == 0;
  STD_TORCH_CHECK(cu_seqlens_q.scalar_type() == ScalarType::Int && cu_seqlens_q.dim() == 1 &&
                      cu_seqlens_q.is_contiguous() && cu_seqlens_q.size(0) >= 1,
                  "cu_seqlens_q: expected a contiguous int32 tensor of num_seqs + 1 offsets");
  const int32_t* starts = static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr());
  const int64_t num_seqs = cu_seqlens_q.size(0) - 1;
  STD_TORCH_CHECK(starts[0] == 0 && starts[num_seqs] == q.size(0),
                  "cu_seqlens_q: expected offsets from 0 to q's ", q.size(0), " tokens");
  for (int64_t i = 0; i < num_seqs; ++i)
    STD_TORCH_CHECK(starts[i] <= starts[i + 1], "cu_seqlens_q: expected ascending offsets");
  call.common.type = type;
  call.common.head_dim = static_cast<int>(q.size(2));
  call.common.k_slot_stride = call.k.token_stride;
  call.common.v_slot_stride = call.v.token_stride;
  call.common.scale = static_cast<float>(softmax_scale);
  const std::vector<Item> items = items_of(starts, num_seqs, q.size(1));
  if (items.empty()) return out;
  const Kernel attend = kernel(call.packs);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(items.size()));
  const int64_t room_bytes =
      2 * std::max(call.packed_bytes(items[0].length), kLanes * call.packed_bytes(std::min<int64_t>(items[0].length, kLaneRows)));
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const Buffer scratch = floats(scratch_floats(call.common.head_dim)), room = floats(room_bytes / 4);
    std::vector<Work> works(kLanes, call.common);
    for (size_t i = next.fetch_add(1); i < items.size(); i = next.fetch_add(1))
      attend_item(call, attend, items[i], reinterpret_cast<char*>(room.get()), works.data(), scratch.get());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cpu_ops, library) {
  library.def("encoder_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, float softmax_scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cpu_ops, CPU, library) { library.impl("encoder_attention", TORCH_BOX(&encoder_attention)); }

}  // namespace cpu_ops
