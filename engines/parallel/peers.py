"""Sums over the devices of one node, by kernels that read the other ranks' memory over NVLink.

The CUDA library has them (csrc/cuda/all_reduce.cuh); engines on Triton take them too where it is installed. Where the
devices are not linked like that, there are none, and sums go by NCCL.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engines import extension
from engines.cuda import table

ROOM = 8 << 20
"""Bytes of a buffer; each rank has two. What is larger keeps the links busy by NCCL as well."""
MOST_RANKS = 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WAIT_BYTES = 1 << 20
"""What a link moves while ranks wait for each other once more: about 3 microseconds of 350 GB/s."""
TEXT_BYTES, HANDLE_BYTES = 256, 64
Gather = Callable[[Tensor], list[Tensor]]
"""The ranks' tensors, of one shape, on the processor."""


class PeerMemory:
    """A rank's buffers, and where it sees those of the others. All ranks make the same calls, in the same order."""

    def __init__(self, addresses: Sequence[int], rank: int, room: int = ROOM) -> None:
        """addresses: of every rank's memory, as this process sees them."""
        self._addresses, self._rank, self._room = torch.tensor(addresses, dtype=torch.int64), rank, room

    def sum(self, x: Tensor) -> Tensor:
        """Of the ranks' x: added in the order of ranks, in float32, rounded once. Does not wait for the device."""
        if not x.is_contiguous() or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
        two_steps = needs_two_steps(min(x.nbytes, self._room), len(self._addresses))
        result: Tensor = torch.ops.cuda_ops.all_reduce(x, self._addresses, self._rank, self._room, two_steps)
        return result


def needs_two_steps(num_bytes: int, ranks: int) -> bool:
    """Whether slices that are summed and fetched are faster than everything read by everyone.

    The one moves 2 (n - 1) / n times the bytes to each of n ranks and waits once more, the other n - 1 times.
    """
    return (ranks - 1) * (ranks - 2) * num_bytes > ranks * WAIT_BYTES


def takes(x: Tensor, ranks: int, invariant: bool) -> bool:
    """Whether a sum is for peers. invariant: NCCL's would have to be added up from everything that all ranks have,
    which is more traffic than any number of rounds."""
    return x.dtype in DTYPES and (x.nbytes <= ROOM or (invariant and ranks > 2))


def meet(rank: int, num_ranks: int, gather: Gather) -> tuple[PeerMemory | None, str | None]:
    """The memory that these ranks share; or None, and why not. To be called by all of them, each on its current
    device."""
    device = torch.cuda.current_device()
    why = _missing(num_ranks, device)
    names = gather(_bytes(_name(device)))
    linked = why is None and _linked(device, [_text(name) for name in names])
    why = _first(gather, why or (None if linked else "the devices are not of one node and linked by NVLink"))
    if why is not None:
        return None, why
    handle, addresses = torch.zeros(HANDLE_BYTES, dtype=torch.uint8), [0] * num_ranks
    try:
        addresses[rank] = torch.ops.cuda_ops.allocate_peer_memory(handle, device, ROOM)
    except RuntimeError as error:
        why = _line(error)
    handles = gather(handle)
    why = _first(gather, why)
    if why is not None:
        return None, why
    try:
        for other, shown in enumerate(handles):
            if other != rank:
                addresses[other] = torch.ops.cuda_ops.open_peer_memory(shown, device)
    except RuntimeError as error:
        why = _line(error)
    why = _first(gather, why)
    return (PeerMemory(addresses, rank), None) if why is None else (None, why)


def _missing(num_ranks: int, device: int) -> str | None:
    """What this rank lacks by itself."""
    if num_ranks > MOST_RANKS:
        return f"there are {num_ranks} ranks, more than {MOST_RANKS}"
    why = extension.reason(extension.CUDA)
    if why is not None:
        return why
    try:
        compiled = table.read(extension.CUDA.path)
        if compiled is None or not table.parse(compiled).serves(torch.cuda.get_device_capability(device)):
            return f"{extension.CUDA.path.name} was not compiled for this device"
        extension.load(extension.CUDA)
    except (OSError, ValueError) as error:
        return _line(error)
    return None


def _name(device: int) -> str:
    """Of a node since its start, and of a device."""
    started = Path("/proc/sys/kernel/random/boot_id")
    node = started.read_text().strip() if started.exists() else str(uuid.getnode())
    return f"{node} {torch.cuda.get_device_properties(device).uuid}"


def _linked(device: int, names: Sequence[str]) -> bool:
    """Whether all of these devices are other ones that this process sees, and linked to this one."""
    seen = {_name(index): index for index in range(torch.cuda.device_count())}
    if len(set(names)) < len(names) or not set(names) <= set(seen):
        return False
    others = [seen[name] for name in names if seen[name] != device]
    return all(torch.ops.cuda_ops.linked(device, other) for other in others)


def _first(gather: Gather, why: str | None) -> str | None:
    """What the first rank says that says anything."""
    return next((text for part in gather(_bytes(why or "")) if (text := _text(part))), None)


def _bytes(text: str) -> Tensor:
    raw = text.encode("ascii", "replace")[:TEXT_BYTES]
    return torch.tensor(list(raw.ljust(TEXT_BYTES, b"\0")), dtype=torch.uint8)


def _text(raw: Tensor) -> str:
    return bytes(raw.tolist()).rstrip(b"\0").decode("ascii")


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
