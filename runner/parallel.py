"""How many devices a job takes, and what each of them does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engines.parallel.place import Place


@dataclass(frozen=True)
class Layout:
    """tp * dp devices, in engines of max(tp, ep) devices each.

    A copy of the model takes tp devices, dp copies take tp * dp. ep adds none, as experts are spread over the same
    devices. With ep <= tp each copy has experts of its own and is an engine. With ep > tp, ep / tp copies share one set
    of experts and are one engine: tp=2, dp=2, ep=4 is one engine of 4 devices; tp=2, dp=4, ep=4 is two.
    """

    tp: int
    dp: int
    ep: int

    @property
    def num_devices(self) -> int:
        return self.tp * self.dp

    @property
    def devices_per_engine(self) -> int:
        return max(self.tp, self.ep)

    @property
    def num_engines(self) -> int:
        return self.num_devices // self.devices_per_engine

    def place(self, device: int) -> tuple[int, Place]:
        """(engine, place in it) of a device, both counted from 0: an engine's devices are neighbours."""
        engine, rank = divmod(device, self.devices_per_engine)
        return engine, Place(rank, self.tp, self.ep)


def findings(tp: int, dp: int, ep: int) -> Iterator[str]:
    """Why sizes do not go together, with the arithmetic."""
    if tp * dp % ep:
        yield (
            f"parallelism.ep: {ep}; expected a divisor of tp * dp = {tp} * {dp} = {tp * dp}, the devices that experts "
            "are spread over; correct it"
        )
    elif ep < tp and tp % ep:
        yield (
            f"parallelism.ep: {ep}; expected a divisor of tp, or a multiple of it: {tp} / {ep} leaves {tp % ep}; "
            "correct it"
        )
    elif ep > tp and ep % tp:
        yield (
            f"parallelism.ep: {ep}; expected a multiple of tp, as copies of the model share experts as a whole: "
            f"{ep} / {tp} leaves {ep % tp}; correct it"
        )
