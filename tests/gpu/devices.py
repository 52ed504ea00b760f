"""Sums over the GPUs of one machine, which read each other's memory: bits, and times beside NCCL's."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from engines.parallel.group import Group
from engines.parallel.peers import MOST_RANKS, ROOM
from engines.parallel.place import Place

SIZES = (1, 8, 1001, 4096, 64 * 4096, 512 * 4096 + 3, ROOM)
"""Elements: no whole vectors, a token of an 8B model, a step of 64 and of 512, more than the buffers' room."""
TIMED = (4096, 8 * 4096, 64 * 4096, 512 * 4096, 1024 * 4096)
ROUNDS = 20
"""Sums of a captured graph, and times that it is replayed."""
PATIENCE = timedelta(seconds=60)


def differences(group: Group, device: torch.device) -> list[str]:
    """Sums that are not those of the definition, to the bit. Several are under way at a time."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = [part_of(group, size, dtype, device) for size in SIZES]
        sums = [group.sum(x.clone()) for x in made]
        for x, own in zip(made, sums, strict=True):
            expected = in_order(group, x)
            if not torch.equal(own, expected):
                wrong = int((own != expected).sum())
                found.append(f"{dtype}, {x.numel():,} elements: {wrong:,} differ on rank {group.place.rank}")
    return found


def part_of(group: Group, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(group.place.rank)
    return (torch.randn(size, generator=generator) * 10**group.place.rank).to(device, dtype)


def in_order(group: Group, x: Tensor) -> Tensor:
    first, *others = group._gathered(x, group.place.ranks)
    total = first.float()
    for part in others:
        total += part
    return total.to(x.dtype)


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of ROUNDS calls, and their results."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for _ in range(ROUNDS)]
    return graph, results


def replay_differences(group: Group, device: torch.device) -> list[str]:
    """The same of a captured graph, with ranks that come late in turn."""
    x = part_of(group, 64 * 4096, torch.bfloat16, device)
    expected = in_order(group, x)
    graph, results = captured(lambda: group.sum(x))
    found = []
    for number in range(ROUNDS):
        if number % group.place.size == group.place.rank:
            time.sleep(0.01)
        graph.replay()
        torch.cuda.synchronize()
        wrong = sum(not torch.equal(result, expected) for result in results)
        if wrong:
            found.append(f"replay {number}: {wrong} of {ROUNDS} sums differ on rank {group.place.rank}")
    return found


def time_us(group: Group, call: Callable[[], Tensor]) -> float:
    """Of one call in a captured graph."""
    graph, _ = captured(call)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    group.wait()
    graph.replay()
    begin.record()
    for _ in range(ROUNDS):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / ROUNDS**2


def rank_main(rank: int, count: int, folder: str) -> None:
    """One of the processes; each writes what it found."""
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    device, group = torch.device("cuda", rank), Group(Place(rank, count))
    group.join(dist.FileStore(f"{folder}/store", count), "cuda", PATIENCE)
    lines = [f"  {note}" for note in group.notes]
    failed = differences(group, device) + replay_differences(group, device)
    for size in TIMED:
        x = part_of(group, size, torch.bfloat16, device)
        own, theirs = (
            time_us(group, lambda x=x: group.sum(x)),
            time_us(group, lambda x=x: group._reduced(x, group.place.ranks)),
        )  # type: ignore[misc]
        lines.append(f"  sum of {x.nbytes / 1024:9,.0f} KiB over {count} {own:10.1f} us  NCCL {theirs:10.1f} us")
    Path(folder, str(rank)).write_text(json.dumps({"lines": lines if rank == 0 else [], "failed": failed}))
    group.leave()


def run() -> tuple[list[str], bool]:
    """(lines to print, whether something is wrong) of all GPUs here."""
    count = min(torch.cuda.device_count(), MOST_RANKS)
    if count < 2:
        return [f"left out: sums over devices need two GPUs, here is {count or 'none'}"], False
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, args=(count, folder), nprocs=count)
        found = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(count)]
    failed = [f"  {line}" for own in found for line in own["failed"]]
    return [*found[0]["lines"], *failed], bool(failed)
