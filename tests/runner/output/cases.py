"""Chunks, tables and a storage that dies at any of its steps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from runner.chunk import FILE_COLUMN, ROW_COLUMN, Chunk
from runner.storage import LocalStorage

SCHEMA = pa.schema(
    [
        (FILE_COLUMN, pa.string()),
        (ROW_COLUMN, pa.int64()),
        ("text", pa.string()),
        ("embedding", pa.list_(pa.float32(), 3)),
        ("tags", pa.list_(pa.struct([("name", pa.string())]))),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
    ]
)
FINGERPRINT = {"model": "m", "task.prompt": "p"}
CHUNK_ROWS = 10


def chunk(index: int, file_id: str = "id") -> Chunk:
    return Chunk(index, "data/ä.jsonl", file_id, index * CHUNK_ROWS, CHUNK_ROWS, index)


def table(index: int, text: str = "text", num_rows: int = CHUNK_ROWS, num_errors: int = 1) -> pa.Table:
    rows = []
    for row in range(num_rows):
        failed = row < num_errors
        rows.append(
            {
                FILE_COLUMN: "data/ä.jsonl",
                ROW_COLUMN: index * CHUNK_ROWS + row,
                "text": None if failed else f"{text} {row}",
                "embedding": None if failed else [1.0, 2.0, float(row)],
                "tags": None if failed else [{"name": "ü"}],
                "error_code": "bad" if failed else None,
                "error_message": "it is bad" if failed else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def names(folder: str | Path) -> list[str]:
    """Sorted names in a folder; [] if there is none."""
    return sorted(path.name for path in Path(folder).iterdir()) if Path(folder).exists() else []


class Crash(BaseException):
    """The process is gone: nothing may handle this."""


class FailingStorage(LocalStorage):
    """Counts its steps; at one of them it raises, before or after the step's effect, or half-way in a write."""

    def __init__(
        self, root: str, step: int = -1, when: str = "before", error: Callable[[], BaseException] = Crash
    ) -> None:
        super().__init__(root)
        self.num_steps = 0
        self._step, self._when, self._error = step, when, error

    def _count(self, effect: Callable[[], Any], torn: Callable[[], Any] | None = None) -> Any:
        number = self.num_steps
        self.num_steps += 1
        if number != self._step:
            return effect()
        if self._when == "after":
            effect()
        elif self._when == "torn" and torn is not None:
            torn()
        raise self._error()

    def _open(self, path: Path, flags: int) -> int:
        if self._step == self.num_steps and self._when == "after":  # the descriptor would leak
            os.close(super()._open(path, flags))
            self._step, self.num_steps = -1, self.num_steps + 1
            raise self._error()
        return self._count(lambda: super(FailingStorage, self)._open(path, flags))

    def _write(self, fd: int, data: memoryview) -> int:
        half = data[: len(data) // 2]
        return self._count(
            lambda: super(FailingStorage, self)._write(fd, data), lambda: super(FailingStorage, self)._write(fd, half)
        )

    def _fsync(self, fd: int) -> None:
        self._count(lambda: super(FailingStorage, self)._fsync(fd))

    def _sync_folder(self, folder: Path) -> None:
        self._count(lambda: super(FailingStorage, self)._sync_folder(folder))

    def _link(self, source: Path, target: Path) -> None:
        self._count(lambda: super(FailingStorage, self)._link(source, target))

    def _rename(self, source: Path, target: Path) -> None:
        self._count(lambda: super(FailingStorage, self)._rename(source, target))

    def _unlink(self, path: Path) -> None:
        self._count(lambda: super(FailingStorage, self)._unlink(path))

    def _mkdir(self, folder: Path) -> None:
        self._count(lambda: super(FailingStorage, self)._mkdir(folder))
