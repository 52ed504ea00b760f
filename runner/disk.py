"""Whether a local output folder has room for what a job writes at the very least, asked before weights are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa

from runner.errors import OutputError

LEAST_BYTES = 16 << 20
"""Free space that any job wants: a journal, a part that is being written, its log."""


def row_bytes(schema: pa.Schema) -> int:
    """What a row of the output takes at least: vectors barely compress, texts may be short."""
    total = 1
    for field in schema:
        if pa.types.is_fixed_size_list(field.type):
            total += field.type.list_size * field.type.value_type.bit_width // 16
    return total


def check_room(folder: str, schema: pa.Schema, num_rows: int | None) -> None:
    """Raises OutputError where a folder of this machine has no room. num_rows: still to be written; None: not known."""
    if "://" in folder:
        return
    place = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    needed = LEAST_BYTES + (num_rows or 0) * row_bytes(schema)
    if free < needed:
        rows = "any job" if num_rows is None else f"{num_rows:,} rows"
        raise OutputError(
            f"output.folder: {place} has {free:,} bytes free; expected at least {needed:,} for {rows}; free some of "
            "it, or set output.folder to another disk"
        )
