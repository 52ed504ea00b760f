"""The books of a job of a billion rows: small, and read in seconds."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from runner.chunk import Chunk, Part
from runner.ledger import Ledger, _encode, _entry_name
from tests.runner.output.cases import FINGERPRINT

NUM_CHUNKS = 100_000
"""Of 10,000 rows, as chunks are by default."""


def part(index: int) -> Part:
    file, start = divmod(index, 1000)
    chunk = Chunk(index, f"data/part-{file:05d}.parquet", f"{file:032x}", start * 10_000, 10_000)
    return Part(
        chunk=chunk,
        path=f"parts/part-{index:08d}.parquet",
        num_rows=10_000,
        num_errors=0,
        num_bytes=1 << 20,
        checksum=f"{index:032x}",
        staged=f"staging/part-{index:08d}.0.{index:016x}.parquet",
        generation=0,
    )


@pytest.mark.slow
def test_a_billion_rows(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    Ledger.open(str(folder), FINGERPRINT)
    (folder / "ledger").mkdir(exist_ok=True)
    (folder / "parts").mkdir(exist_ok=True)
    for index in range(NUM_CHUNKS):
        made = part(index)
        (folder / "ledger" / _entry_name(index, 0)).write_bytes(_encode(made))
        (folder / made.path).touch()
    Ledger.open(str(folder), FINGERPRINT)  # makes the roll-ups that a running job makes as it goes
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    ledger = Ledger.open(str(folder), FINGERPRINT)
    seconds = time.monotonic() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    size = sum(file.stat().st_size for file in (folder / "ledger").iterdir())
    print(f"opened in {seconds:.1f} s, {grown:.0f} MiB more, {size / 1e6:.0f} MB of entries and copies")
    assert len(ledger.done()) == NUM_CHUNKS
    assert grown < 100
    assert size < 200e6
    assert seconds < 60  # seconds on any machine; the figure is in docs/reliability.md
