"""Rows of text files found by a streaming scan: ranges of records in flat memory, plain or compressed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from runner.errors import InputError
from runner.source.base import Range
from runner.source.paths import UNREADABLE, InputFile, reason

BLOCK_BYTES = 4 << 20
MAX_RECORD_BYTES = 256 << 20
"""A longer record is taken for a file that is not what it says."""
MAX_RANGE_BYTES = 256 << 20
"""A range ends with the record that reaches this size, however few rows it has: memory is bounded, whatever a
compressed file unpacks to."""


class RecordScanner(Protocol):
    """Finds the ends of records in blocks of a stream that are given in order."""

    def ends(self, block: bytes) -> np.ndarray:
        """Offsets just behind each record end in the block, ascending."""


class LineScanner:
    """Every newline ends a record."""

    def ends(self, block: bytes) -> np.ndarray:
        return np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1


class QuotedScanner:
    """Newlines outside of quotes end a record, as RFC 4180 has it: a quote opens only where a field begins.

    Scanning by the parity of quotes is exact unless a quote stands inside an unquoted field (5" pipe); blocks where one
    does are walked quote by quote.
    """

    def __init__(self, delimiter: str) -> None:
        self._separators = np.frombuffer(f"{delimiter}\r\n".encode(), np.uint8)
        self._in_quotes = False
        self._last = ord("\n")
        """The byte before the block; 0 in place of a quote that means nothing."""

    def ends(self, block: bytes) -> np.ndarray:
        data = np.frombuffer(block, np.uint8)
        newlines = np.flatnonzero(data == ord("\n"))
        quotes = np.flatnonzero(data == ord('"'))
        toggles, in_quotes = quotes, self._in_quotes
        if len(quotes):
            before = np.where(quotes > 0, data[np.maximum(quotes - 1, 0)], self._last)
            opens = (np.arange(len(quotes)) % 2 == 0) != in_quotes
            # An opening quote behind another is the second half of an escaped one.
            sound = ~opens | np.isin(before, self._separators) | (before == ord('"'))
            if not sound.all():
                toggles = self._walk(data, quotes)
        inside = (np.searchsorted(toggles, newlines) % 2 == 1) != in_quotes
        self._in_quotes = (len(toggles) % 2 == 1) != in_quotes
        if len(data):
            literal = data[-1] == ord('"') and (not len(toggles) or toggles[-1] != len(data) - 1)
            self._last = 0 if literal else int(data[-1])
        return newlines[~inside] + 1

    def _walk(self, data: np.ndarray, quotes: np.ndarray) -> np.ndarray:
        """The quotes that open or close a field, or pair up inside of one."""
        inside, closed_at = self._in_quotes, -2
        if not inside and self._last == ord('"'):
            closed_at = -1
        separators = set(self._separators.tolist())
        result = []
        for position in quotes.tolist():
            before = int(data[position - 1]) if position else self._last
            if inside:
                inside, closed_at = False, position
            elif before in separators or closed_at == position - 1:
                inside = True
            else:
                continue
            result.append(position)
        return np.array(result, dtype=np.int64)


class Stream:
    """A file read forward in blocks, decompressed, from some offset of its content."""

    def __init__(self, file: InputFile, offset: int) -> None:
        self.file = file
        self.offset = offset
        """Of what `next_block` gives next."""
        try:
            self._stream = file.open_stream()
            if file.compression is None:
                self._stream.seek(offset)
            else:
                self._skip(offset)
        except UNREADABLE as error:
            raise self._damaged(error) from None

    def next_block(self) -> bytes:
        """The next bytes; b"" at the end. Raises InputError if they cannot be read or decompressed."""
        try:
            block = self._stream.read(BLOCK_BYTES)
        except UNREADABLE as error:
            raise self._damaged(error) from None
        self.offset += len(block)
        return block

    def close(self) -> None:
        self._stream.close()

    def _skip(self, num_bytes: int) -> None:
        while num_bytes:
            block = self._stream.read(min(num_bytes, BLOCK_BYTES))
            if not block:
                return
            num_bytes -= len(block)

    def _damaged(self, error: Exception) -> InputError:
        return InputError(
            f"{self.file.name}: cannot be read at byte {self.offset} ({reason(error)}); expected a whole "
            f"{self.file.compression or 'plain'} file; restore it"
        )


def scan(file: InputFile, scanner: RecordScanner, chunk_rows: int, offset: int = 0) -> Iterator[Range]:
    """Ranges of at most `chunk_rows` records and about MAX_RANGE_BYTES, with the byte where each begins.

    The last record needs no end. Memory: one block.
    """
    stream = Stream(file, offset)
    begin, rows, start = offset, 0, 0  # where the range begins, its records so far, number of its first record
    last_end = offset
    while block := stream.next_block():
        position = stream.offset - len(block)
        ends = scanner.ends(block)
        used = 0
        while rows + len(ends) - used >= chunk_rows:
            used += chunk_rows - rows
            yield Range(start, chunk_rows, begin)
            begin, start, rows = position + int(ends[used - 1]), start + chunk_rows, 0
        rows += len(ends) - used
        if len(ends):
            last_end = position + int(ends[-1])
            if last_end - begin >= MAX_RANGE_BYTES and rows:
                yield Range(start, rows, begin)
                begin, start, rows = last_end, start + rows, 0
        if stream.offset - last_end > MAX_RECORD_BYTES:
            raise InputError(
                f"{file.name}: no record ends within {MAX_RECORD_BYTES >> 20} MiB of byte {last_end}; expected one a "
                "line, and closed quotes; check the file and dataset.format"
            )
    stream.close()
    if stream.offset > last_end:
        rows += 1
    if rows:
        yield Range(start, rows, begin)


class RecordReader:
    """Reads ranges of a file's records; forward reading of neighbouring ranges goes over the file once."""

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self._stream: Stream | None = None
        self._rest = b""

    def read(self, offset: int, num_records: int, scanner: RecordScanner, enough: int | None = None) -> bytes:
        """The bytes of records from an offset; the scanner is new, and stands at the beginning of a record.

        enough: reading may end after this many bytes, in the middle of a record.
        """
        at = -1 if self._stream is None else self._stream.offset - len(self._rest)
        if offset != at:
            if self._stream is not None and self.file.compression is not None and 0 <= at < offset:
                self._forward(offset - at)
            else:
                if self._stream is not None:
                    self._stream.close()
                self._stream, self._rest = Stream(self.file, offset), b""
        assert self._stream is not None
        pieces, found = [], 0
        block = self._rest or self._stream.next_block()
        while block:
            ends = scanner.ends(block)
            if found + len(ends) >= num_records:
                cut = int(ends[num_records - found - 1])
                pieces.append(block[:cut])
                self._rest = block[cut:]
                return b"".join(pieces)
            found += len(ends)
            pieces.append(block)
            if enough is not None and sum(map(len, pieces)) >= enough:
                break
            block = self._stream.next_block()
        self._rest = b""
        return b"".join(pieces)

    def _forward(self, num_bytes: int) -> None:
        assert self._stream is not None
        while num_bytes > len(self._rest):
            num_bytes -= len(self._rest)
            self._rest = self._stream.next_block()
            if not self._rest:
                return
        self._rest = self._rest[num_bytes:]
