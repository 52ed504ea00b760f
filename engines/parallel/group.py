"""The ranks that hold one model together, and what they tell each other.

Tensors go between the devices (NCCL; gloo between processors), sums of a step's size over NVLink by kernels that read
the other ranks' memory (engines/parallel/peers.py). The first rank leads: it sends commands, lists of
numbers, over gloo whatever the device, and the others wait for them as long as it takes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engines.parallel.peers import PeerMemory, meet, takes
from engines.parallel.place import Place

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

FIRST = 64
"""Numbers in the first part of a command; most have no second one."""
PATIENCE = timedelta(days=365)
"""For commands: a leader may have nothing to do. Its end is noticed at once, as the connection's."""


class GroupError(RuntimeError):
    """The ranks are out of step, or one has gone: nothing more can be computed together."""


class Group:
    """One rank's view. A group of one rank passes everything through."""

    def __init__(self, place: Place = Place(), invariant: bool = True) -> None:  # noqa: B008
        """invariant: sums do not depend on what else is in a batch."""
        self.place = place
        self._invariant = invariant
        self._control: ProcessGroup | None = None
        self._parts: dict[range, ProcessGroup] = {}
        """Groups of some of the ranks, this one among them."""
        self._peers: dict[range, PeerMemory] = {}
        self.notes: list[str] = []
        """How sums are made, where that is not as fast as it could be."""

    def join(self, store: Store, device: str, timeout: timedelta) -> None:
        """Meet the others at the store. To be called once: torch.distributed knows one world a process.

        device: torch's word for what the model is on. timeout: longest that a rank waits for another one in a step.
        """
        import torch.distributed as dist

        own = "" if device == "cpu" else f",{device}:{dist.get_default_backend_for_device(device)}"
        dist.init_process_group(
            f"cpu:gloo{own}", store=store, rank=self.place.rank, world_size=self.place.size, timeout=timeout
        )
        self._control = dist.new_group(backend="gloo", timeout=PATIENCE)
        places = [Place(rank, self.place.tp, self.place.ep) for rank in self.place.ranks]
        parts = [ranks for place in places for ranks in (place.copy_ranks, place.peers)]
        for ranks in sorted({part for part in parts if 1 < len(part) < self.place.size}, key=lambda part: (*part,)):
            part = dist.new_group([*ranks], timeout=timeout)  # all ranks make all groups, in one order
            if self.place.rank in ranks:
                self._parts[ranks] = part
        if torch.device(device).type == "cuda" and torch.version.hip is None:
            self._meet_peers()

    def _meet_peers(self) -> None:
        for ranks in dict.fromkeys((self.place.copy_ranks, self.place.ranks)):
            if len(ranks) == 1:
                continue
            memory, why = meet(ranks.index(self.place.rank), len(ranks), functools.partial(self._gathered, ranks=ranks))
            if memory is not None:
                self._peers[ranks] = memory
            else:
                self.notes.append(f"sums over {len(ranks)} devices are left to NCCL: {why}")

    def leave(self) -> None:
        """Nothing can be told or asked any more."""
        if self._control is not None:
            import torch.distributed as dist

            dist.destroy_process_group()
            self._control = None

    def sum(self, x: Tensor) -> Tensor:
        """Of the summands of the ranks that hold a copy, in x's dtype; may modify x. The same on all to the bit.

        invariant: of two summands the order does not matter; more are added in the order of ranks, in float32, rounded
        once. Else as the library does it, whose order depends on where in the tensor a number is. Devices that read
        each other's memory always add in the order of ranks.
        """
        return self._sum(x, self.place.copy_ranks)

    def sum_all(self, x: Tensor) -> Tensor:
        """As `sum`, over the ranks of all copies."""
        return self._sum(x, self.place.ranks)

    def _sum(self, x: Tensor, ranks: range) -> Tensor:
        if len(ranks) == 1:
            return x
        if ranks in self._peers and takes(x, len(ranks), self._invariant):
            return self._peers[ranks].sum(x)
        if len(ranks) == 2 or not self._invariant:
            return self._reduced(x, ranks)
        first, *others = self._gathered(x, ranks)
        total = first.to(torch.promote_types(x.dtype, torch.float32))
        for part in others:
            total += part
        return total.to(x.dtype)

    def join_columns(self, x: Tensor, total: int) -> Tensor:
        """The columns of the ranks that hold a copy side by side: [n, held] of place.split(total) -> [n, total]."""
        if self.place.tp == 1:
            return x
        widest = -(-total // self.place.tp)
        padded = x if x.shape[1] == widest else torch.nn.functional.pad(x, (0, widest - x.shape[1]))
        counts = [len(Place(rank, self.place.tp).split(total)) for rank in range(self.place.tp)]
        parts = zip(self._gathered(padded, self.place.copy_ranks), counts, strict=True)
        return torch.cat([part[:, :count] for part, count in parts], dim=1)

    def join_copies(self, x: Tensor, counts: Sequence[int] | None = None) -> tuple[Tensor, slice]:
        """The rows of all copies, one copy after the other, and which of them are this one's.

        x: [n, size], the same on all ranks of a copy. counts: of all copies' rows; None: they are asked.
        """
        peers = self.place.peers
        if counts is None:
            counts = [int(part) for part in self._gathered(torch.tensor([len(x)]), peers)]
        longest, first = max(counts), sum(counts[: self.place.copy])
        padded = torch.nn.functional.pad(x, (0, 0, 0, longest - len(x)))
        parts = zip(self._gathered(padded, peers) if longest else [x] * len(counts), counts, strict=True)
        return torch.cat([part[:count] for part, count in parts]), slice(first, first + len(x))

    def share(self, x: Tensor) -> Tensor:
        """The leader's x; the others give one of its shape and dtype, which is filled."""
        if self.place.size > 1:
            self._broadcast(x, self.place.ranks)
        return x

    def share_in_copy(self, x: Tensor) -> Tensor:
        """As `share`, with the first of the ranks that hold a copy as its leader."""
        if self.place.tp > 1:
            self._broadcast(x, self.place.copy_ranks)
        return x

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers, once all have given theirs."""
        if self.place.size == 1:
            return number
        return min(int(part) for part in self._gathered(torch.tensor([number], dtype=torch.int64), self.place.ranks))

    def wait(self) -> None:
        """For all ranks to come here."""
        self.least(0)

    def command(self, numbers: Sequence[int]) -> None:
        """Tell the others what to do next; for the leader."""
        if self.place.size == 1:
            return
        whole = torch.zeros(max(FIRST, 1 + len(numbers)), dtype=torch.int64)
        whole[: 1 + len(numbers)] = torch.tensor([len(numbers), *numbers])
        self._broadcast(whole[:FIRST], self.place.ranks, patient=True)
        if len(whole) > FIRST:
            self._broadcast(whole[FIRST:], self.place.ranks, patient=True)

    def obey(self) -> list[int]:
        """What the leader's next command is. Raises RuntimeError when the leader has gone."""
        first = torch.empty(FIRST, dtype=torch.int64)
        self._broadcast(first, self.place.ranks, patient=True)
        length = int(first[0])
        rest = torch.empty(max(0, 1 + length - FIRST), dtype=torch.int64)
        if len(rest):
            self._broadcast(rest, self.place.ranks, patient=True)
        return torch.cat((first, rest))[1 : 1 + length].tolist()

    def _reduced(self, x: Tensor, ranks: range) -> Tensor:
        import torch.distributed as dist

        x = x.contiguous()
        dist.all_reduce(x, group=self._parts.get(ranks))
        return x

    def _gathered(self, x: Tensor, ranks: range) -> list[Tensor]:
        """The ranks' x, which have one shape."""
        import torch.distributed as dist

        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in ranks]
        dist.all_gather(parts, x.contiguous(), group=self._parts.get(ranks))
        return parts

    def _broadcast(self, x: Tensor, ranks: range, patient: bool = False) -> None:
        """The first rank's x. patient: wait for it as long as it takes; for all ranks."""
        import torch.distributed as dist

        dist.broadcast(x, ranks[0], group=self._control if patient else self._parts.get(ranks))


ALONE = Group()
