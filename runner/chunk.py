"""Identities that source, sink and ledger share. A leaf of the import graph."""

from __future__ import annotations

from dataclasses import asdict, dataclass

ROW_COLUMN = "_row"
"""int64 column of every batch and every part: the row's number in its input file, from 0."""
FILE_COLUMN = "_file"
"""string column of every part: the input file as the configuration's path leads to it."""
ERROR_COLUMN = "_error"
"""string column of a batch that holds unreadable rows: why a row could not be read, null for the others."""
RESERVED_COLUMNS = (FILE_COLUMN, ROW_COLUMN, ERROR_COLUMN)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A numbered range of rows of one input file: the unit of reading, of commit and of resumption."""

    index: int
    """Position in the job's input, from 0, without gaps. Independent of shards and workers."""
    file: str
    """Path or URL, without credentials."""
    file_id: str
    """Content identity of the file: a digest of its size and of its first and last bytes."""
    start: int
    """Number of the first row in the file."""
    num_rows: int
    """Rows of the file in this range, before any filter."""
    locator: int = 0
    """Where the range begins in the format's own terms: row group, record batch or byte offset."""

    def identity(self) -> dict[str, str | int]:
        """What a ledger entry records and a resumed job compares: everything but nothing that depends on this run."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Part:
    """One committed Parquet file: the rows of one chunk, in input order."""

    chunk: Chunk
    path: str
    """Relative to the job's output folder."""
    num_rows: int
    num_errors: int
    num_bytes: int
    checksum: str
    """xxh3-128 of the file's bytes, hexadecimal."""
    staged: str = ""
    """Where the file waits until it is committed, relative to the output folder; unique to this attempt."""
    generation: int = 0
    """How often the chunk was committed before: `retry_errors` commits the next generation in place of the last."""
