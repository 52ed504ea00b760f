"""What it costs many workers to share a job by leases: the bookkeeping of chunks, without any rows.

All workers are in this process, each with a ledger and leases of its own, over one folder; a random one commits its
chunk and takes the next, until all are committed. The folder is in memory (/dev/shm) unless another one is given, so
that the figure is the runner's own work and not a disk's.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from runner.chunk import Chunk, Part
from runner.config import ShardConfig
from runner.leases import Leases
from runner.ledger import Ledger
from runner.storage import part_path, staged_path

CHUNK_ROWS = 10_000


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", type=int, nargs="?", default=10**9)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(json.dumps(simulate(folder, args.rows // CHUNK_ROWS, args.workers)))


def simulate(folder: str, num_chunks: int, num_workers: int) -> dict[str, float]:
    """Seconds of processor time for each 1,000 chunks, and memory."""
    chunks = [
        Chunk(index, f"data/part-{index // 1000:05d}.parquet", f"{index // 1000:032x}", index * CHUNK_ROWS, CHUNK_ROWS)
        for index in range(num_chunks)
    ]
    chance = random.Random(0)
    began, wall = time.process_time(), time.monotonic()
    crew = []
    for index in range(num_workers):
        ledger = Ledger.open(folder, {"job": "bench"})
        crew.append(Worker(ledger, Leases(ledger, f"w{index}-a-1-{index}-0", chunks, ShardConfig(index, num_workers))))
    working = list(crew)
    while working:
        place = chance.randrange(len(working))
        if working[place].finished():
            working[place] = working[-1]
            working.pop()
    taken_s = time.process_time() - began
    num_done = len(crew[0].ledger.entered())
    assert num_done == num_chunks
    for worker in crew:
        worker.leases.close()
    return {
        "rows": num_chunks * CHUNK_ROWS,
        "chunks": num_chunks,
        "workers": num_workers,
        "cpu_s_per_1000_chunks": round(taken_s / num_chunks * 1000, 3),
        "wall_s": round(time.monotonic() - wall, 1),
        "most_chunks_of_one_worker": max(worker.num_committed for worker in crew),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


class Worker:
    def __init__(self, ledger: Ledger, leases: Leases) -> None:
        self.ledger, self.leases = ledger, leases
        self.num_committed = 0
        self._chunk: Chunk | None = None

    def finished(self) -> bool:
        """Commit what is held and take the next; whether there is nothing left to take now."""
        if self._chunk is not None:
            self._commit(self._chunk)
        taken = self.leases.take()
        self._chunk = None if taken is None else taken.chunk
        return taken is None

    def _commit(self, chunk: Chunk) -> None:
        staged = staged_path(chunk.index, 0)
        self.ledger.storage.write(staged, b"-")
        part = Part(chunk, part_path(chunk.index), chunk.num_rows, 0, 1, "0" * 32, staged)
        assert self.ledger.commit(part)
        self.leases.committed(chunk.index)
        self.num_committed += 1
