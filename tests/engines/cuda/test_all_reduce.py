"""Sums over emulated devices that read each other's memory: the same bits everywhere, whoever comes late."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.cuda.opset import OpSet
from engines.parallel import peers
from tests.compare import assert_bitwise_equal
from tests.csrc.cuda import emulated

ROOM = 16 << 10
SIZES = (1, 7, 8, 96, 515, 4096, 8192, 9001)
"""Elements: less than a vector, no whole vectors, several blocks of threads, more than a buffer has room for."""


class Devices:
    """Ranks whose launches run side by side."""

    def __init__(self, count: int, room: int = ROOM, library: Path | None = None) -> None:
        """library: None for the one of the sources as they are."""
        self.count, self.room = count, room
        self._emulator = ctypes.CDLL(str(library or emulated.library()))
        self._keep: list[Tensor] = []
        handles = [torch.zeros(peers.HANDLE_BYTES, dtype=torch.uint8) for _ in range(count)]
        for rank, handle in enumerate(handles):
            torch.ops.cuda_ops.allocate_peer_memory(handle, rank, room)
        self._memory = torch.tensor([torch.ops.cuda_ops.open_peer_memory(handle, 0) for handle in handles])

    def launch(self, parts: Sequence[Tensor], two_steps: bool) -> list[Tensor]:
        """What will be the results on every rank, once they have run."""
        results = []
        for rank, x in enumerate(parts):
            self._emulator.emulator_choose(rank)
            results.append(torch.ops.cuda_ops.all_reduce(x, self._memory, rank, self.room, two_steps))
        self._keep += parts
        return results

    def run(self) -> None:
        self._emulator.emulator_run()
        self._keep.clear()


def parts_of(ranks: int, size: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, generator=generator) * 10**rank).to(dtype) for rank in range(ranks)]


def in_order(parts: Sequence[Tensor]) -> Tensor:
    """As engines.parallel.group.Group.sum has it."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    yield lambda name: monkeypatch.setenv("EMULATOR_ORDER", name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize(("ranks", "two_steps"), ((2, False), (3, True), (5, False), (8, True)))
def test_every_rank_has_the_sum_in_the_order_of_ranks(
    ops: OpSet, ranks: int, two_steps: bool, dtype: torch.dtype
) -> None:
    devices = Devices(ranks)
    for size in SIZES:
        parts = parts_of(ranks, size, dtype)
        found = devices.launch([part.clone() for part in parts], two_steps)
        devices.run()
        for result in found:
            assert_bitwise_equal(result, in_order(parts))


def run_calls(seed: int, order: Callable[[str], object], library: Path | None = None) -> None:
    """A few calls of random kinds and sizes on random ranks that follow each other without a pause, in a random order
    of threads and devices."""
    choose = random.Random(seed)
    devices = Devices(choose.randint(2, 4), choose.choice((4096, ROOM)), library)
    order(f"{choose.choice(('random', 'warp'))}:{seed}")
    for _ in range(2):
        expected, found = [], []
        for number in range(4):
            two_steps, size = choose.random() < 0.5, choose.choice((3, 700, 2500, 5000))
            parts = parts_of(devices.count, size, torch.bfloat16, seed * 10 + number)
            expected.append(in_order(parts))
            found.append(devices.launch(parts, two_steps))
        devices.run()
        for results, right in zip(found, expected, strict=True):
            for result in results:
                assert_bitwise_equal(result, right)


@pytest.mark.parametrize("seed", range(12))
def test_calls_that_follow_each_other(ops: OpSet, order: Callable[[str], None], seed: int) -> None:
    run_calls(seed, order)


@pytest.mark.parametrize("name", ("forward", "reverse"))
def test_a_rank_that_is_always_last(ops: OpSet, order: Callable[[str], None], name: str) -> None:
    order(name)
    devices = Devices(3)
    made = [parts_of(3, size, torch.float32, size) for size in (5000, 8, 3000, 5000, 5000)]
    found = [devices.launch(parts, number % 2 == 1) for number, parts in enumerate(made)]
    devices.run()
    for results, parts in zip(found, made, strict=True):
        for result in results:
            assert_bitwise_equal(result, in_order(parts))


def test_what_the_kernel_cannot_take_is_refused(ops: OpSet) -> None:
    memory = torch.zeros(2, dtype=torch.int64)
    whole = torch.zeros(64)
    for x, found, room in (
        (whole[1:], memory, 1024),
        (whole.view(8, 8).t(), memory, 1024),
        (whole, memory[:1], 1024),
        (whole, memory, 1000),
        (whole.double(), memory, 1024),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.cuda_ops.all_reduce(x, found, 0, room, False)


def test_which_sums_are_for_peers() -> None:
    def of(num_bytes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(num_bytes // dtype.itemsize, dtype=dtype, device="meta")

    assert peers.takes(of(peers.ROOM), 2, False)
    assert not peers.takes(of(peers.ROOM + 2), 2, True)  # of two summands the order does not matter
    assert not peers.takes(of(peers.ROOM + 2), 4, False)
    assert peers.takes(of(peers.ROOM + 2), 4, True)
    assert not peers.takes(of(64, torch.float64), 4, True)
    assert not peers.needs_two_steps(peers.ROOM, 2)
    assert [peers.needs_two_steps(size << 10, 4) for size in (600, 700)] == [False, True]
    assert [peers.needs_two_steps(size << 10, 8) for size in (190, 200)] == [False, True]
