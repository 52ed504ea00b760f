"""The ranks that hold one model together, and what they tell each other.

Tensors go between the devices (NCCL; gloo between processors). The first rank leads: it sends commands, lists of
numbers, over gloo whatever the device, and the others wait for them as long as it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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

    def leave(self) -> None:
        """Nothing can be told or asked any more."""
        if self._control is not None:
            import torch.distributed as dist

            dist.destroy_process_group()
            self._control = None

    def sum(self, x: Tensor) -> Tensor:
        """Of the ranks' summands, in x's dtype; may modify x. The same on all ranks to the bit.

        invariant: of two summands the order does not matter; more are added in the order of ranks, in float32, rounded
        once. Else as the library does it, whose order depends on where in the tensor a number is.
        """
        if self.place.size == 1:
            return x
        if self.place.size == 2 or not self._invariant:
            return self._reduced(x)
        first, *others = self._gathered(x)
        total = first.to(torch.promote_types(x.dtype, torch.float32))
        for part in others:
            total += part
        return total.to(x.dtype)

    def join_columns(self, x: Tensor, total: int) -> Tensor:
        """The ranks' columns side by side: [n, held] of place.split(total) -> [n, total]."""
        if self.place.tp == 1:
            return x
        widest = -(-total // self.place.tp)
        padded = x if x.shape[1] == widest else torch.nn.functional.pad(x, (0, widest - x.shape[1]))
        counts = [len(Place(rank, self.place.tp).split(total)) for rank in range(self.place.tp)]
        parts = zip(self._gathered(padded), counts, strict=True)
        return torch.cat([part[:, :count] for part, count in parts], dim=1)

    def share(self, x: Tensor) -> Tensor:
        """The leader's x; the others give one of its shape and dtype, which is filled."""
        if self.place.size > 1:
            self._broadcast(x)
        return x

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers, once all have given theirs."""
        if self.place.size == 1:
            return number
        return min(int(part) for part in self._gathered(torch.tensor([number], dtype=torch.int64)))

    def wait(self) -> None:
        """For all ranks to come here."""
        self.least(0)

    def command(self, numbers: Sequence[int]) -> None:
        """Tell the others what to do next; for the leader."""
        if self.place.size == 1:
            return
        whole = torch.zeros(max(FIRST, 1 + len(numbers)), dtype=torch.int64)
        whole[: 1 + len(numbers)] = torch.tensor([len(numbers), *numbers])
        self._broadcast(whole[:FIRST], patient=True)
        if len(whole) > FIRST:
            self._broadcast(whole[FIRST:], patient=True)

    def obey(self) -> list[int]:
        """What the leader's next command is. Raises RuntimeError when the leader has gone."""
        first = torch.empty(FIRST, dtype=torch.int64)
        self._broadcast(first, patient=True)
        length = int(first[0])
        rest = torch.empty(max(0, 1 + length - FIRST), dtype=torch.int64)
        if len(rest):
            self._broadcast(rest, patient=True)
        return torch.cat((first, rest))[1 : 1 + length].tolist()

    def _reduced(self, x: Tensor) -> Tensor:
        import torch.distributed as dist

        x = x.contiguous()
        dist.all_reduce(x)
        return x

    def _gathered(self, x: Tensor) -> list[Tensor]:
        """The ranks' x, which have one shape."""
        import torch.distributed as dist

        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.place.size)]
        dist.all_gather(parts, x.contiguous())
        return parts

    def _broadcast(self, x: Tensor, patient: bool = False) -> None:
        """patient: wait for the leader as long as it takes."""
        import torch.distributed as dist

        dist.broadcast(x, 0, group=self._control if patient else None)


ALONE = Group()
