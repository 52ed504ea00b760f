// The op all_reduce, and the memory that ranks show each other for it: checks and launches.

#include "all_reduce.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "tensors.h"

namespace cuda_ops {
namespace {

void check_handle(const Tensor& handle) {
  STD_TORCH_CHECK(handle.scalar_type() == ScalarType::Byte, "handle: expected uint8");
  check_vector(handle, kHandleBytes, "handle");
}

// Whether two devices of this process read each other's memory over NVLink.
bool linked(int64_t device, int64_t other) { return devices_linked(static_cast<int>(device), static_cast<int>(other)); }

// The address of memory on a device with two buffers of `room` bytes, for as long as the process lives. Writes what
// another process opens it by to handle: uint8 [64], on the processor.
int64_t allocate_peer_memory(Tensor handle, int64_t device, int64_t room) {
  check_handle(handle);
  STD_TORCH_CHECK(room > 0 && room % 16 == 0, "room: ", room, " bytes; expected a multiple of 16");
  void* made = allocate_shown(static_cast<int>(device), kPeerStateBytes + 2 * room, handle.mutable_data_ptr());
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(made));
}

// The address here of memory that another process has allocated, for as long as both live.
int64_t open_peer_memory(const Tensor& handle, int64_t device) {
  check_handle(handle);
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(open_shown(static_cast<int>(device), handle.const_data_ptr())));
}

// The sum of the ranks' x, in x's dtype: added in float32 in the order of ranks, rounded once. All ranks make the same
// calls with the same sizes. x: any shape, contiguous, float32, float16 or bfloat16. peers: [ranks] int64 on the
// processor, addresses here of the ranks' memories. room: bytes of their buffers; a larger x takes several rounds.
Tensor all_reduce(const Tensor& x, const Tensor& peers, int64_t rank, int64_t room, bool two_steps) {
  STD_TORCH_CHECK(x.is_contiguous() && divides_16(x), "x: expected contiguous memory from where 16 bytes begin");
  const int64_t ranks = peers.numel();
  STD_TORCH_CHECK(ranks >= 2 && ranks <= kPeers && rank >= 0 && rank < ranks, "peers: rank ", rank, " of ", ranks,
                  "; expected 2 to ", kPeers);
  STD_TORCH_CHECK(room > 0 && room % 16 == 0, "room: ", room, " bytes; expected a multiple of 16");
  const int64_t* addresses = int64s(peers, ranks, "peers");
  Tensor out = torch::stable::empty_like(x);
  const int64_t total = x.numel();
  if (total == 0) return out;
  const Place place(x.get_device_index());
  with_float(x, "x", [&]<class Tagged>(Tagged) {
    using T = typename Tagged::type;
    const int64_t most = room / static_cast<int64_t>(sizeof(T));
    for (int64_t begin = 0; begin < total; begin += most) {
      AllReduceParams p{{}, data<T>(x) + begin, mutable_data<T>(out) + begin, std::min(most, total - begin), room,
                        static_cast<int>(rank), static_cast<int>(ranks)};
      for (int64_t q = 0; q < ranks; ++q) p.peers[q] = reinterpret_cast<unsigned char*>(addresses[q]);
      const int64_t vectors = ceil_div(p.count, PeerVector<T>::kSize), held = two_steps ? ceil_div(vectors, ranks) : vectors;
      const dim3 grid(static_cast<unsigned>(std::min<int64_t>(ceil_div(held, kPeerThreads), kPeerBlocks)));
      const auto kernel = two_steps ? all_reduce_kernel<T, true> : all_reduce_kernel<T, false>;
      launch(kernel, grid, dim3(kPeerThreads), 0, place, p);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def("linked(int device, int other) -> bool");
  library.def("allocate_peer_memory(Tensor(a!) handle, int device, int room) -> int");
  library.def("open_peer_memory(Tensor handle, int device) -> int");
  library.def("all_reduce(Tensor x, Tensor peers, int rank, int room, bool two_steps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CompositeExplicitAutograd, library) {
  library.impl("linked", TORCH_BOX(&linked));
  library.impl("allocate_peer_memory", TORCH_BOX(&allocate_peer_memory));
  library.impl("open_peer_memory", TORCH_BOX(&open_peer_memory));
}

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA_OPS_DISPATCH_KEY, library) {
  library.impl("all_reduce", TORCH_BOX(&all_reduce));
}

}  // namespace cuda_ops
