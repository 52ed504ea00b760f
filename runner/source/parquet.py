"""Parquet files. Chunks are ranges of a file's rows, whatever its row groups: small groups share a chunk, a big one
holds many. Row groups whose statistics rule the filter out are not read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from runner.chunk import ROW_COLUMN, Chunk
from runner.config import DatasetConfig
from runner.errors import InputError
from runner.source.base import FileSource, Range, row_numbers
from runner.source.paths import UNREADABLE, InputFile, partition_value, reason

SUFFIXES = (".parquet", ".pq")
MAX_CHUNK_BYTES = 2 << 30
"""Of a chunk's columns in memory."""
BATCH_BYTES = 256 << 20
BATCH_ROWS = 10_000
MAX_METADATA_BYTES = 256 << 20
"""Of a footer's texts and of its lists, each."""


def open(dataset: DatasetConfig, files: Sequence[InputFile]) -> ParquetSource:
    """The rows of Parquet files."""
    return ParquetSource(dataset, files)


class ParquetSource(FileSource):
    """Rows of Parquet files. Reading in order costs one pass; elsewhere a chunk costs its row group up to its end."""

    def __init__(self, dataset: DatasetConfig, files: Sequence[InputFile]) -> None:
        self._open: _OpenFile | None = None
        super().__init__(dataset, files)

    def infer_schema(self) -> pa.Schema:
        return self._opened(self.files[0]).reader.schema_arrow

    def ranges(self, file: InputFile) -> Iterator[Range]:
        opened = _OpenFile(file)  # not the one that is being read, which may be behind
        self.check_columns(file, opened.reader.schema_arrow)
        group_starts = opened.group_starts
        num_rows = int(group_starts[-1])
        for start in range(0, num_rows, self.dataset.chunk_rows):
            group = int(np.searchsorted(group_starts, start, side="right")) - 1
            yield Range(start, min(self.dataset.chunk_rows, num_rows - start), group)

    def read_range(self, file: InputFile, chunk: Chunk, columns: list[str]) -> pa.Table:
        opened = self._opened(file)
        if opened.may_pass is None:
            opened.may_pass = self._groups_that_may_pass(file, opened)
        try:
            return opened.read(chunk.start, chunk.start + chunk.num_rows, columns)
        except UNREADABLE as error:
            raise InputError(
                f"{file.name}: rows {chunk.start} to {chunk.start + chunk.num_rows - 1} cannot be read "
                f"({reason(error)}); expected a sound Parquet file; restore it"
            ) from None

    def _opened(self, file: InputFile) -> _OpenFile:
        if self._open is None or self._open.name != file.name:
            self._open = _OpenFile(file)
        return self._open

    def _groups_that_may_pass(self, file: InputFile, opened: _OpenFile) -> np.ndarray:
        """For each row group, whether its statistics and the file's folder leave room for a row that passes."""
        num_groups = len(opened.group_starts) - 1
        if self._filter is None or num_groups == 0:
            return np.ones(num_groups, dtype=bool)
        known = pc.scalar(True)
        for field in self._partition_fields:
            value = partition_value(file, field)
            column = pc.field(field.name)
            known = known & (column.is_null() if value is None else column == pa.scalar(value, field.type))
        with file.open() as stream:
            fragment = pa.dataset.ParquetFileFormat().make_fragment(stream, partition_expression=known)
            try:
                passing = fragment.subset(self._filter.expression, schema=self.schema).row_groups
            except pa.ArrowException:
                # Statistics of another type than the schema's cannot be compared: then every group is read.
                return np.ones(num_groups, dtype=bool)
        result = np.zeros(num_groups, dtype=bool)
        result[[group.id for group in passing]] = True
        return result


class _OpenFile:
    """A file's footer, and a reader that stands at some row."""

    def __init__(self, file: InputFile) -> None:
        self.name = file.name
        try:
            self._stream = file.open()
            self.reader = pq.ParquetFile(
                self._stream,
                thrift_string_size_limit=MAX_METADATA_BYTES,
                thrift_container_size_limit=MAX_METADATA_BYTES >> 4,
            )
            self.reader.schema_arrow  # noqa: B018 -- raises where the footer's schema is damaged
        except UNREADABLE as error:
            raise InputError(f"{file.name}: {reason(error)}; expected a Parquet file; check it") from None
        metadata = self.reader.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.group_starts = np.cumsum([0, *sizes])
        """Number of the first row of each row group; then the number of rows."""
        self.may_pass: np.ndarray | None = None
        self._columns: list[str] | None = None
        self._pieces: Iterator[tuple[int, pa.RecordBatch]] = iter(())
        self._next: tuple[int, pa.RecordBatch] | None = None
        self._position = 0

    def read(self, start: int, stop: int, columns: list[str]) -> pa.Table:
        """Rows from start to stop - 1 of the row groups that may pass, with ROW_COLUMN."""
        if not columns:
            return self._numbers(start, stop)
        self._seek(start, columns)
        batches, numbers, num_bytes = [], [], 0
        while self._next is not None:
            first, batch = self._next
            begin, end = max(first, start), min(first + batch.num_rows, stop)
            if begin < end:
                batches.append(batch.slice(begin - first, end - begin))
                numbers.append(row_numbers(begin, end))
                num_bytes += batches[-1].nbytes
            if num_bytes > MAX_CHUNK_BYTES:
                raise InputError(
                    f"{self.name}: rows {start} to {stop - 1} take more than {MAX_CHUNK_BYTES >> 30} GiB; expected "
                    "less; lower dataset.chunk_rows"
                )
            if first + batch.num_rows > stop:
                break
            self._next = next(self._pieces, None)
        self._position = stop
        schema = pa.schema([self.reader.schema_arrow.field(name) for name in columns])
        table = pa.Table.from_batches([batch.select(columns) for batch in batches], schema if not batches else None)
        return table.append_column(ROW_COLUMN, pa.chunked_array(numbers, pa.int64()))

    def _numbers(self, start: int, stop: int) -> pa.Table:
        assert self.may_pass is not None
        rows = np.arange(start, stop, dtype=np.int64)
        groups = np.searchsorted(self.group_starts, rows, side="right") - 1
        return pa.table({ROW_COLUMN: pa.array(rows[self.may_pass[groups]])})

    def _seek(self, start: int, columns: list[str]) -> None:
        """Stand so that the next piece is the first that can hold row `start`: go on if that is near, else jump."""
        group = int(np.searchsorted(self.group_starts, start, side="right")) - 1
        if self._columns == columns and self.group_starts[group] <= self._position <= start:
            return
        self._columns = columns
        self._pieces = self._from_group(group, columns)
        self._next = next(self._pieces, None)

    def _from_group(self, group: int, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches with the number of their first row, of each run of neighbouring row groups that may pass."""
        assert self.may_pass is not None
        num_groups = len(self.may_pass)
        while group < num_groups:
            if not self.may_pass[group]:
                group += 1
                continue
            end = group
            while end < num_groups and self.may_pass[end]:
                end += 1
            first = int(self.group_starts[group])
            groups = list(range(group, end))
            size = self._batch_rows(groups, columns)
            for batch in self.reader.iter_batches(size, row_groups=groups, columns=columns, use_threads=False):
                yield first, batch
                first += batch.num_rows
            group = end

    def _batch_rows(self, groups: Sequence[int], columns: list[str]) -> int:
        """Rows that may be read at once so that about BATCH_BYTES come of them, however often they repeat one value.

        Only a dictionary and values that begin as the one before them take less room in a file than in memory.
        """
        roots = {*columns}
        largest = 1
        for group in groups:
            row_group = self.reader.metadata.row_group(group)
            for index in range(row_group.num_columns):
                column = row_group.column(index)
                if column.path_in_schema.split(".")[0] not in roots or column.physical_type != "BYTE_ARRAY":
                    continue
                if "DELTA_BYTE_ARRAY" in column.encodings:
                    largest = max(largest, column.total_uncompressed_size)
                elif column.has_dictionary_page:
                    largest = max(largest, self._dictionary_bytes(column.dictionary_page_offset))
        return max(1, min(BATCH_ROWS, BATCH_BYTES // largest))

    def _dictionary_bytes(self, offset: int) -> int:
        """Size of a dictionary when unpacked, from its page's header.

        Source: https://github.com/apache/parquet-format, PageHeader: its second field is uncompressed_page_size, an
        i32 as a zigzag varint in Thrift's compact protocol; each of the first fields has one byte in front (0x15).
        """
        self._stream.seek(offset)
        header = self._stream.read(16)
        place = 1
        while place < len(header) and header[place] & 0x80:
            place += 1
        value = shift = 0
        for byte in header[place + 2 :]:
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        return (value >> 1) ^ -(value & 1)
