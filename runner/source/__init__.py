"""Where rows come from. One module a format, found by its file name; all of them give numbered chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import pyarrow as pa

from runner.chunk import Chunk


class Source(Protocol):
    """The input of a job, readable in any order and any number of times."""

    schema: pa.Schema
    """Of the user's columns, without the reserved ones."""

    def chunks(self) -> Iterator[Chunk]:
        """All chunks in input order, lazily: memory does not grow with the input."""

    def read(self, chunk: Chunk, columns: list[str] | None) -> pa.RecordBatch:
        """The rows of a chunk that pass the filter, in order: `columns` (None: all), then ROW_COLUMN.

        Raises InputError, naming the file, when its content is no longer the one that the chunk was made from.
        """
