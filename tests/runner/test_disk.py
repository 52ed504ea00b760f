"""A job that cannot be written is refused before weights are read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from runner import disk
from runner.errors import OutputError

VECTORS = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float32(), 1024)), ("error", pa.string())])
TEXTS = pa.schema([("text", pa.string())])


def full(monkeypatch: pytest.MonkeyPatch, free: int) -> list[Path]:
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(disk.shutil, "disk_usage", usage)
    return asked


def test_vectors_take_what_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = full(monkeypatch, 1 << 30)
    folder = tmp_path / "not" / "there" / "yet"
    disk.check_room(str(folder), VECTORS, 400_000)
    assert asked == [tmp_path]
    with pytest.raises(OutputError) as caught:
        disk.check_room(str(folder), VECTORS, 1_000_000)
    assert str(caught.value) == (
        f"output.folder: {tmp_path} has 1,073,741,824 bytes free; expected at least 2,065,777,216 for 1,000,000 rows; "
        "free some of it, or set output.folder to another disk"
    )


def test_a_full_disk_is_refused_whatever_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, 1000)
    with pytest.raises(OutputError, match=r"has 1,000 bytes free; expected at least 16,777,216 for any job"):
        disk.check_room(str(tmp_path), TEXTS, None)
    disk.check_room("s3://bucket/there", VECTORS, 1 << 40)


def test_this_machine_has_room(tmp_path: Path) -> None:
    disk.check_room(str(tmp_path), TEXTS, 10)
