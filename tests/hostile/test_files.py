"""Damaged and hostile files: rows, errors of rows, or one message that names the file; never a crash."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.conftest import ROOT

FORMATS = ("parquet", "arrow", "jsonl", "csv", "jsonl.gz", "csv.zst")
BOMB_BYTES = 3 << 30
READ = """
import resource, sys
from pathlib import Path
from tests.hostile.read_files import MEMORY_LIMIT, peak_bytes, read
resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
print(read(Path(sys.argv[1])), peak_bytes() >> 20)
"""


def child(*arguments: str) -> str:
    """What a process printed that must end by itself with 0."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(name: str) -> None:
    found = child("-m", "tests.hostile.read_files", name, "0", "60")
    assert "InputError" in found or "error rows" in found


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_thousands_of_damaged_files(name: str) -> None:
    child("-m", "tests.hostile.read_files", name, "1000", "2000")


def _zeros(path: Path, line: bytes, end: bytes) -> None:
    """A file that unpacks to BOMB_BYTES of this line, and then the end."""
    piece = line * (1 << 20)
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else zstandard.open(path, "wb") as file:
        for _ in range(BOMB_BYTES // len(piece)):
            file.write(piece)
        file.write(end)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [("rows.jsonl.gz", b" ", b'{"text": 1}\n'), ("rows.csv.zst", b"x", b"\n1\n"), ("rows.jsonl.zst", b"[", b"")],
)
def test_a_small_file_that_unpacks_to_gigabytes_in_one_line(
    tmp_path: Path, name: str, begin: bytes, end: bytes
) -> None:
    path = tmp_path / name
    _zeros(path, begin, end)
    assert path.stat().st_size < 20 << 20
    what, peak_mib = child("-c", READ, str(path)).rsplit(maxsplit=1)
    assert what in ("InputError", "error rows") and int(peak_mib) < 2000


def test_json_nested_a_million_deep(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [b'{"text": "sound"}', b'{"text": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", b"[" * 1_000_000]
    lines += [b'{"a":' * 1_000_000, b'{"text": "sound, too"}']
    path.write_bytes(b"\n".join(lines))
    assert child("-c", READ, str(path)).startswith(("error rows", "rows"))


def test_a_parquet_page_that_says_it_is_larger_than_memory(tmp_path: Path) -> None:
    """A column of one long value, many times: kilobytes on disk, gigabytes as rows."""
    path = tmp_path / "rows.parquet"
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 30_000, pa.int32()), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"text": text}), path)
    assert path.stat().st_size < 1 << 20
    what, peak_mib = child("-c", READ.replace("RLIMIT_AS", "RLIMIT_CORE"), str(path)).rsplit(maxsplit=1)
    assert what in ("InputError", "rows") and int(peak_mib) < 3500


def test_columns_without_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({f"{row}_{i}": i for i in range(500)}) for row in range(60)))
    assert child("-c", READ, str(path)).startswith("InputError")


def test_a_device_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("/dev/zero")
    assert child("-c", READ, str(tmp_path / "rows.jsonl")).startswith(("InputError", "ConfigError"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert child("-c", READ, str(tmp_path / "pipe.jsonl")).startswith(("InputError", "ConfigError"))
