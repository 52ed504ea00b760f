"""Reads damaged and hostile files in a process of its own: `python -m tests.hostile.read_files FORMAT FIRST COUNT`.

Ends with 0 when each was rows, error rows or one message within its time; a crash of the process is what is looked for.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars
import zstandard

from runner.chunk import ERROR_COLUMN
from runner.config import DatasetConfig
from runner.errors import RunnerError
from runner.source import open_source

MAX_READ_S = 20.0
MEMORY_LIMIT = 6 << 30
"""Of addresses; libraries that are loaded take one or two of it."""
MAX_GROWTH = 700 << 20
"""Of resident memory over that of the first file."""


def _table() -> polars.DataFrame:
    chance = random.Random(0)
    rows = range(300)
    return polars.DataFrame(
        {
            "id": list(rows),
            "text": [chance.randbytes(20).hex() + ('ä\n",' if i % 3 else "") for i in rows],
            "score": [i / 7 for i in rows],
            "tags": [["a", "b"][: i % 3] for i in rows],
            "inner": [{"role": "user", "content": str(i)} for i in rows],
        }
    )


def _written(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def sound(name: str) -> bytes:
    """A file of this format that can be read."""
    table = _table()
    flat = table.drop("tags", "inner")
    return {
        "parquet": lambda: _written(lambda f: table.write_parquet(f, compression="zstd", row_group_size=100)),
        "arrow": lambda: _written(table.write_ipc),
        "jsonl": lambda: table.write_ndjson().encode(),
        "csv": lambda: flat.write_csv().encode(),
        "jsonl.gz": lambda: gzip.compress(table.write_ndjson().encode()),
        "csv.zst": lambda: zstandard.compress(flat.write_csv().encode()),
    }[name]()


def damaged(content: bytes, seed: int) -> bytes:
    """With bits flipped, bytes put in, a piece doubled or taken out, or cut short."""
    chance = random.Random(seed)
    made = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8, 64])):
        at = chance.randrange(len(made))
        # Lengths and offsets stand at the ends of these formats.
        at = chance.choice([at, at % 64, len(made) - 1 - at % 200])
        at = min(max(at, 0), len(made) - 1)
        match chance.randrange(6):
            case 0 | 1:
                made[at] ^= 1 << chance.randrange(8)
            case 2:
                made[at] = chance.choice([0, 255, 127, 10, 34, 44])
            case 3:
                made[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 4:
                del made[at : at + chance.randrange(1, 100)]
            case _:
                made[at:at] = made[at : at + chance.randrange(1, 300)]
        if len(made) < 2:
            break
    return bytes(made[: chance.randrange(len(made) + 1)]) if chance.random() < 0.2 else bytes(made)


def read(path: Path) -> str:
    """What came of it: "rows", "error rows" or the name of the error."""
    began = time.process_time()
    try:
        source = open_source(DatasetConfig(str(path), chunk_rows=128))
        bad = False
        for chunk in source.chunks():
            batch = source.read(chunk, None)
            batch.validate(full=True)
            batch.slice(0, 64).to_pylist()
            bad |= ERROR_COLUMN in batch.schema.names
        return "error rows" if bad else "rows"
    except RunnerError as error:
        assert path.name in str(error) or str(path.parent) in str(error), error
        return type(error).__name__
    finally:
        assert time.process_time() - began < MAX_READ_S, path


def peak_bytes() -> int:
    """Most resident memory of this process so far. getrusage counts what its parent had, too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def main(name: str, first: int, count: int) -> None:
    content, found = sound(name), Counter[str]()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows.{name}"
        path.write_bytes(content)
        assert read(path) == "rows"
        before = peak_bytes()
        for seed in range(first, first + count):
            print(f"{name} {seed}", file=sys.stderr, flush=True)
            path.write_bytes(damaged(content, seed))
            found[read(path)] += 1
            assert peak_bytes() - before < MAX_GROWTH
    print(dict(found))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
