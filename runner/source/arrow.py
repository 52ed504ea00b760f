"""Arrow IPC: the file format (Feather V2) and the stream format, which `datasets` writes; told by their first bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import pyarrow as pa

from runner.chunk import ROW_COLUMN, Chunk
from runner.config import DatasetConfig
from runner.errors import InputError
from runner.source.base import FileSource, Range, row_numbers
from runner.source.paths import UNREADABLE, InputFile, reason

SUFFIXES = (".arrow", ".feather", ".ipc", ".arrows")


def open(dataset: DatasetConfig, files: Sequence[InputFile]) -> ArrowSource:
    """The rows of Arrow IPC files."""
    return ArrowSource(dataset, files)


class ArrowSource(FileSource):
    """Rows of Arrow IPC files. Reading in order costs one pass; going back in a stream begins it again."""

    def __init__(self, dataset: DatasetConfig, files: Sequence[InputFile]) -> None:
        self._reader: _Reader | None = None
        super().__init__(dataset, files)

    def infer_schema(self) -> pa.Schema:
        return _open_ipc(self.files[0]).schema

    def ranges(self, file: InputFile) -> Iterator[Range]:
        schema = _open_ipc(file).schema
        self.check_columns(file, schema)
        start = num_rows = locator = 0
        for index, size in enumerate(_batch_sizes(file, schema)):
            while num_rows + size > self.dataset.chunk_rows:
                taken = self.dataset.chunk_rows - num_rows
                yield Range(start, self.dataset.chunk_rows, locator)
                start, num_rows, locator, size = start + self.dataset.chunk_rows, 0, index, size - taken
            if num_rows == 0:
                locator = index
            num_rows += size
        if num_rows:
            yield Range(start, num_rows, locator)

    def read_range(self, file: InputFile, chunk: Chunk, columns: list[str]) -> pa.Table:
        numbers = row_numbers(chunk.start, chunk.start + chunk.num_rows)
        if not columns:
            return pa.table({ROW_COLUMN: numbers})
        if self._reader is None or (self._reader.name, self._reader.columns) != (file.name, columns):
            self._reader = _Reader(file, columns)
        table = self._reader.read(chunk.start, chunk.start + chunk.num_rows)
        return table.append_column(ROW_COLUMN, numbers)


class _Reader:
    """Some columns of a file, batch after batch."""

    def __init__(self, file: InputFile, columns: list[str]) -> None:
        self.name = file.name
        self.columns = columns
        self._file = file
        schema = _open_ipc(file).schema
        self._fields = sorted(schema.get_field_index(name) for name in columns)
        self._starts = [0]
        """Number of the first row of each batch seen so far and of the one after."""
        self._open()

    def _open(self) -> None:
        self._ipc = _open_ipc(self._file, self._fields)
        self._next = 0
        self._batch: pa.RecordBatch | None = None
        self._first = 0

    def read(self, start: int, stop: int) -> pa.Table:
        self._seek(start)
        batches = []
        while self._first < stop:
            batch = self._batch
            if batch is None:
                raise InputError(f"{self.name}: ends before row {stop - 1}; expected the whole file; restore it")
            begin, end = max(self._first, start), min(self._first + batch.num_rows, stop)
            if begin < end:
                batches.append(batch.slice(begin - self._first, end - begin))
            if self._first + batch.num_rows > stop:
                break
            self._first += batch.num_rows
            self._batch = self._load()
        return pa.Table.from_batches(batches)

    def _seek(self, row: int) -> None:
        if self._batch is None or row < self._first:
            if isinstance(self._ipc, pa.RecordBatchStreamReader):
                self._open()
            else:
                self._next = max(0, bisect_right(self._starts, row) - 1)
            self._first = self._starts[self._next]
            self._batch = self._load()
        while self._batch is not None and self._first + self._batch.num_rows <= row:
            self._first += self._batch.num_rows
            self._batch = self._load()

    def _load(self) -> pa.RecordBatch | None:
        """The next batch; None at the end."""
        try:
            if isinstance(self._ipc, pa.RecordBatchStreamReader):
                batch = self._ipc.read_next_batch()
            elif self._next < self._ipc.num_record_batches:
                batch = self._ipc.get_batch(self._next)
            else:
                return None
        except StopIteration:
            return None
        except UNREADABLE as error:
            raise _damaged(self._file, error) from None
        self._next += 1
        if self._next == len(self._starts):
            self._starts.append(self._starts[-1] + batch.num_rows)
        return batch


def _open_ipc(
    file: InputFile, fields: list[int] | None = None
) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    stream = file.open()
    try:
        magic = stream.read(6)
        stream.seek(0)
        if magic == b"ARROW1":
            return pa.ipc.open_file(stream, options=options)
        return pa.ipc.open_stream(stream, options=options)
    except UNREADABLE as error:
        raise _damaged(file, error) from None


def _batch_sizes(file: InputFile, schema: pa.Schema) -> Iterator[int]:
    """Rows of each batch, with as little reading as Arrow allows: one column's buffers."""
    narrow = [index for index, field in enumerate(schema) if not pa.types.is_nested(field.type)][:1]
    ipc = _open_ipc(file, (narrow or [0]) if len(schema) else None)
    try:
        if isinstance(ipc, pa.RecordBatchStreamReader):
            for batch in ipc:
                yield batch.num_rows
        else:
            for index in range(ipc.num_record_batches):
                yield ipc.get_batch(index).num_rows
    except UNREADABLE as error:
        raise _damaged(file, error) from None


def _damaged(file: InputFile, error: Exception) -> InputError:
    return InputError(
        f"{file.name}: {reason(error)}; expected an Arrow IPC file or stream; restore it, or check dataset.format"
    )
