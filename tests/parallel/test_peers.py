"""Ranks that add up by reading each other's memory: how they meet, and that models come out as without it."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines import extension
from engines.cuda.opset import OpSet
from engines.parallel import peers
from engines.parallel.peers import PeerMemory
from engines.parallel.place import Place
from tests.csrc.cuda import emulated
from tests.parallel import cases

HERE = threading.local()


@pytest.fixture(scope="module")
def library() -> Path:
    why = emulated.absent()
    if why is not None:
        pytest.skip(why)
    OpSet(emulated.library())
    return emulated.library()


@pytest.fixture
def node(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated devices, as many as there are ranks; a thread's own has its number."""
    monkeypatch.setattr(peers, "_missing", lambda num_ranks, device: None)
    monkeypatch.setattr(peers, "_name", lambda device: f"node {device}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: HERE.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def meet_all(count: int) -> list[tuple[PeerMemory | None, str | None]]:
    threads = cases.Threads(count)

    def one(rank: int) -> tuple[PeerMemory | None, str | None]:
        HERE.device = rank
        group = cases.ThreadGroup(Place(rank, count), threads)
        return peers.meet(rank, count, functools.partial(group._gathered, ranks=range(count)))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.usefixtures("node")
def test_all_ranks_have_the_addresses_of_all() -> None:
    found = meet_all(3)
    assert all(memory is not None and why is None for memory, why in found)
    assert len({tuple(memory._addresses.tolist()) for memory, _ in found if memory is not None}) == 1


def refuses(error: str) -> Callable[..., int]:
    def op(*arguments: object) -> int:
        if HERE.device == 1:
            raise RuntimeError(f"{error}\nmore about it")
        return 1 << 20

    return op


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize(
    ("name", "change", "why"),
    (
        ("_missing", lambda num_ranks, device: "no library" if device == 2 else None, "no library"),
        (
            "_name",
            lambda device: f"node {device}" if device < 2 else f"other {HERE.device} {device}",
            "not of one node",
        ),
        ("_name", lambda device: "node 0", "not of one node"),
        ("linked", lambda device, other: {device, other} != {1, 2}, "not of one node and linked by NVLink"),
        ("allocate_peer_memory", refuses("no room"), "no room"),
        ("open_peer_memory", refuses("may not look"), "may not look"),
    ),
)
def test_one_rank_that_cannot_is_enough(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., object], why: str
) -> None:
    monkeypatch.setattr(peers if name.startswith("_") else torch.ops.cuda_ops, name, change)
    found = meet_all(3)
    assert [memory for memory, _ in found] == [None] * 3
    assert len({text for _, text in found}) == 1
    assert why in str(found[0][1])


def test_what_a_rank_lacks_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = extension.Library(tmp_path / "_cuda_ops.so", "DISABLE_CUDA_ENGINE", "reinstall")
    monkeypatch.setattr(extension, "CUDA", absent)
    monkeypatch.delenv("DISABLE_CUDA_ENGINE", raising=False)
    assert peers._missing(16, 0) == "there are 16 ranks, more than 8"
    assert peers._missing(2, 0) == "_cuda_ops.so was not built; reinstall"
    absent.path.write_bytes(b"cuda_ops table 1\nsm 80\nend\n")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert peers._missing(2, 0) == "_cuda_ops.so was not compiled for this device"


class Queued(PeerMemory):
    """Sums of threads on emulated devices: launched by all, run by the first."""

    lock = threading.Lock()

    def __init__(self, emulator: ctypes.CDLL, threads: cases.Threads, addresses: list[int], rank: int) -> None:
        super().__init__(addresses, rank, room=64 << 10)
        self.emulator, self.threads, self.num_sums = emulator, threads, 0

    def sum(self, x: Tensor) -> Tensor:
        self.num_sums += 1
        with self.lock:
            self.emulator.emulator_choose(self._rank)
            result = super().sum(x)
            self.emulator.emulator_choose(-1)
        ranks = range(len(self._addresses))
        self.threads.wait(ranks)
        if self._rank == 0:
            self.emulator.emulator_run()
        self.threads.wait(ranks)
        return result


@pytest.mark.parametrize(("kind", "ranks"), (("gqa", 2), ("moe", 4)))
def test_a_model_comes_out_as_without(
    library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, ranks: int
) -> None:
    emulator = ctypes.CDLL(str(library))
    handles = [torch.zeros(peers.HANDLE_BYTES, dtype=torch.uint8) for _ in range(ranks)]
    addresses = [torch.ops.cuda_ops.allocate_peer_memory(handle, 0, 64 << 10) for handle in handles]
    made: list[Queued] = []

    class Group(cases.ThreadGroup):
        def __init__(self, place: Place, threads: cases.Threads, invariant: bool = True) -> None:
            super().__init__(place, threads, invariant)
            made.append(Queued(emulator, threads, addresses, place.rank))
            self._peers = {place.ranks: made[-1]}

    folder, work = cases.make(kind, tmp_path / "model"), cases.requests()[:3]
    settings = cases.settings(folder, ranks, ranks if kind == "moe" else 1)
    expected = cases.in_threads(settings, work)
    monkeypatch.setattr(cases, "ThreadGroup", Group)
    found = cases.in_threads(settings, work)
    assert len(made) == ranks and len({queued.num_sums for queued in made}) == 1 and made[0].num_sums > 50
    assert found == expected, "to the bit: in the order of ranks, in float32"
