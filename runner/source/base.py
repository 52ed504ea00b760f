"""What all file formats share: numbering of chunks, limit, filter, projection, identity of files, one schema.

A format says where ranges of rows are in a file and reads one. Rows are numbered in the file as it is stored; filter
and limit take rows away and renumber nothing. A chunk never spans two files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from runner.chunk import ERROR_COLUMN, RESERVED_COLUMNS, ROW_COLUMN, Chunk
from runner.config import DatasetConfig
from runner.errors import InputError
from runner.source.filter import Filter, parse
from runner.source.paths import UNREADABLE, InputFile, partition_fields, partition_value, reason

UNREADABLE_COLUMN = "_unreadable"
"""bool column that a format adds to ERROR_COLUMN: rows of which the filter cannot be asked, so that they are kept.

That is where the whole record is broken or a column of the filter is. It must not depend on the columns that are read,
or a row would count at one time and not at another.
"""


MAX_COLUMNS = 20_000
MAX_COLUMN_BYTES = 2 << 30
"""Of one column of a chunk."""


class Range(NamedTuple):
    """Consecutive rows of a file."""

    start: int
    num_rows: int
    locator: int


class FileSource(ABC):
    """A source over files of one format. Not for use by several threads at once."""

    every_row_counts = True
    """Whether each row of a range is a row of the data set: false where a format has blank lines."""

    def __init__(self, dataset: DatasetConfig, files: Sequence[InputFile]) -> None:
        self.dataset = dataset
        self.files = files
        self._by_name = {file.name: file for file in files}
        self._stamps: dict[tuple[str, str], tuple[int, ...] | None] = {}
        """Of each file and identity, as they were when they last agreed."""
        try:
            self._file_schema = _plain_schema(self.infer_schema(), files[0].name)
        except UNREADABLE as error:
            raise InputError(f"{files[0].name}: {reason(error)}; expected a sound file; restore it") from None
        own = [field for field in self._file_schema if field.name not in RESERVED_COLUMNS]
        names = {field.name for field in own}
        self._partition_fields = [field for field in partition_fields(files) if field.name not in names]
        self.schema = pa.schema([*own, *self._partition_fields])
        self._filter: Filter | None = None if dataset.filter is None else parse(dataset.filter, self.schema)

    # What a format defines.

    @abstractmethod
    def infer_schema(self) -> pa.Schema:
        """Columns of the files, from the first of them."""

    @abstractmethod
    def ranges(self, file: InputFile) -> Iterator[Range]:
        """The file cut into ranges of at most `chunk_rows` rows, lazily."""

    @abstractmethod
    def read_range(self, file: InputFile, chunk: Chunk, columns: list[str]) -> pa.Table:
        """Rows of a chunk in order: these columns of the file, then ROW_COLUMN.

        If rows are bad, ERROR_COLUMN and UNREADABLE_COLUMN follow: see `error_columns`.

        May leave out rows that cannot pass the filter. Types may differ from the schema's where they can be cast.
        """

    # What a caller uses: see runner.source.Source.

    def chunks(self) -> Iterator[Chunk]:
        """All chunks in input order, lazily: memory does not grow with the input."""
        index = 0
        remaining = self.dataset.limit
        for file in self.files:
            if remaining == 0:
                break
            file_id = file.identity()
            for start, num_rows, locator in self.ranges(file):
                chunk = Chunk(index, file.name, file_id, start, num_rows, locator)
                if remaining is not None:
                    num_rows, taken = self._within(chunk, remaining)
                    remaining -= taken
                    chunk = Chunk(index, file.name, file_id, start, num_rows, locator)
                yield chunk
                index += 1
                if remaining == 0:
                    break
        if index == 0:
            yield Chunk(0, self.files[0].name, self.files[0].identity(), 0, 0, 0)

    def read(self, chunk: Chunk, columns: list[str] | None) -> pa.RecordBatch:
        """The rows of a chunk that pass the filter: see runner.source.Source."""
        file = self._checked(chunk)
        wanted = self.schema.names if columns is None else list(columns)
        known = set(self.schema.names)
        missing = [name for name in wanted if name not in known]
        if missing:
            raise InputError(
                f"{chunk.file}: no column {', '.join(missing)}; expected some of {', '.join(self.schema.names)}"
            )
        needed = list(dict.fromkeys([*wanted, *(self._filter.columns if self._filter else ())]))
        table = self._table(file, chunk, needed)
        self._checked(chunk)
        if self._filter is not None:
            keep = self._filter.expression
            if ERROR_COLUMN in table.schema.names:
                keep = keep | pc.field(UNREADABLE_COLUMN)
            table = table.filter(keep)
        if ERROR_COLUMN in table.schema.names and table.column(ERROR_COLUMN).null_count == table.num_rows:
            table = table.drop_columns([ERROR_COLUMN])
        errors = [ERROR_COLUMN] if ERROR_COLUMN in table.schema.names else []
        return one_batch(table.select([*wanted, ROW_COLUMN, *errors]), chunk)

    def check_unchanged(self, committed: Mapping[str, str], complete: bool) -> None:
        """Compare the files with those of committed chunks: see runner.source.Source."""
        again = "restore the input, or start a new job (on_change=new or another name)"
        for name, file_id in committed.items():
            file = self._by_name.get(name)
            if file is None:
                raise InputError(
                    f"{name}: is no longer part of the input; expected the files that the job had; {again}"
                )
            if file.identity() != file_id:
                raise InputError(f"{name}: its content has changed; expected what the job was made from; {again}")
        if not complete or self.dataset.limit is not None:
            return
        for name, file in self._by_name.items():
            if name not in committed and next(self.ranges(file), None) is not None:
                raise InputError(f"{name}: is a new file of the input; expected the files that the job had; {again}")

    # Parts of the above.

    def _within(self, chunk: Chunk, remaining: int) -> tuple[int, int]:
        """Rows of the chunk's range up to the last that the limit allows, and how many of them count."""
        if self._filter is None and self.every_row_counts:
            num_rows = min(chunk.num_rows, remaining)
            return num_rows, num_rows
        rows = self.read(chunk, []).column(ROW_COLUMN).to_numpy()
        if len(rows) < remaining:
            return chunk.num_rows, len(rows)
        return int(rows[remaining - 1]) + 1 - chunk.start, remaining

    def _checked(self, chunk: Chunk) -> InputFile:
        """The file of a chunk, once it is known to be the same as when the chunk was made."""
        file = self._by_name.get(chunk.file)
        if file is None:
            raise InputError(f"{chunk.file}: is no longer part of the input; expected the files it had; restore it")
        known, stamp = (chunk.file, chunk.file_id), file.stamp()
        if known not in self._stamps or stamp not in (None, self._stamps[known]):
            if file.identity() != chunk.file_id:
                raise InputError(
                    f"{chunk.file}: its content has changed; expected what chunk {chunk.index} was made from; restore "
                    "the file, or start a new job (on_change=new or another name)"
                )
            self._stamps[known] = stamp
        return file

    def _table(self, file: InputFile, chunk: Chunk, columns: list[str]) -> pa.Table:
        """These columns of a chunk in the source's types, with ROW_COLUMN and perhaps ERROR_COLUMN; not filtered."""
        partitions = {field.name: field for field in self._partition_fields}
        stored = [name for name in columns if name not in partitions]
        if chunk.num_rows:
            table = self.read_range(file, chunk, stored)
        else:
            schema = pa.schema([*(self.schema.field(name) for name in stored), pa.field(ROW_COLUMN, pa.int64())])
            table = schema.empty_table()
        table, damaged = self._sound(table, stored, chunk)
        arrays, fields = [], []
        for name in columns:
            field = self.schema.field(name)
            if name in partitions:
                value = pa.scalar(partition_value(file, field), field.type)
                arrays.append(pa.chunked_array([pa.repeat(value, table.num_rows)]))
            else:
                arrays.append(self._conform(table.column(name), field, file))
            fields.append(field)
        for name in (ROW_COLUMN, *(() if damaged else (ERROR_COLUMN, UNREADABLE_COLUMN))):
            if name in table.schema.names:
                arrays.append(table.column(name))
                fields.append(table.schema.field(name))
        for name, array in damaged.items():
            arrays.append(pa.chunked_array([array]))
            fields.append(pa.field(name, array.type))
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    def _sound(self, table: pa.Table, columns: list[str], chunk: Chunk) -> tuple[pa.Table, dict[str, pa.Array]]:
        """The table without values that are not what Arrow promises, and what to say about them, if there are any.

        Text that is no UTF-8 and offsets that lead nowhere: a file can hold them, and Arrow reads them as they are.
        """
        misfits: dict[str, dict[int, str]] = {}
        for name in columns:
            index = table.schema.get_field_index(name)
            try:
                table.column(index).validate(full=True)
            except pa.ArrowException as error:
                sound, misfits[name] = _without_unsound(table.column(index), str(error).splitlines()[0][:200])
                table = table.set_column(index, name, sound)
        if not misfits:
            return table, {}
        broken, unreadable = {}, set()
        if ERROR_COLUMN in table.schema.names:
            said = table.column(ERROR_COLUMN).to_pylist()
            broken = {place: why for place, why in enumerate(said) if why is not None}
            unreadable = {place for place, on in enumerate(table.column(UNREADABLE_COLUMN).to_pylist()) if on}
        return table, self.error_columns(table.num_rows, broken, misfits, unreadable)

    def _conform(self, column: pa.ChunkedArray, field: pa.Field, file: InputFile) -> pa.ChunkedArray:
        if column.type.equals(field.type):
            return column
        if sum(unpacked_bytes(chunk) for chunk in column.chunks) > MAX_COLUMN_BYTES:
            raise InputError(
                f"{file.name}: column {field.name} repeats values that take over {MAX_COLUMN_BYTES >> 30} GiB in a "
                "chunk; expected less; lower dataset.chunk_rows"
            )
        try:
            return pa.chunked_array([_cast(storage_of(chunk), field.type) for chunk in column.chunks], field.type)
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise self.type_error(file, field, column.type, str(error).splitlines()[0]) from None

    def type_error(self, file: InputFile, field: pa.Field, found: pa.DataType, why: str = "") -> InputError:
        """A column that has another type in this file than in the first."""
        return InputError(
            f"{file.name}: column {field.name} is {found}{f' ({why})' if why else ''}; expected {field.type}, as in "
            f"{self.files[0].name}; give all files one schema"
        )

    def error_columns(
        self,
        num_rows: int,
        broken: Mapping[int, str],
        misfits: Mapping[str, Mapping[int, str]],
        unreadable: Collection[int] | None = None,
    ) -> dict[str, pa.Array]:
        """ERROR_COLUMN and UNREADABLE_COLUMN; {} if nothing is wrong.

        Args:
            broken: Why a record cannot be read, by position.
            misfits: Values that are not of their column's type: column -> position -> what was found.
            unreadable: Positions in `broken` of which the filter cannot be asked; None: all.
        """
        errors = dict(broken)
        unreadable = set(broken if unreadable is None else unreadable)
        for name, found in misfits.items():
            for position, why in found.items():
                errors.setdefault(position, f"column {name}: {why}")
            if self._filter is not None and name in self._filter.columns:
                unreadable |= found.keys()
        if not errors:
            return {}
        return {
            ERROR_COLUMN: pa.array([errors.get(position) for position in range(num_rows)], pa.string()),
            UNREADABLE_COLUMN: pa.array([position in unreadable for position in range(num_rows)], pa.bool_()),
        }

    def check_columns(self, file: InputFile, schema: pa.Schema) -> None:
        """Raise InputError if a file lacks a column or has one of a type that has nothing to do with the first's."""
        missing = [name for name in self._file_schema.names if name not in schema.names]
        if missing:
            raise InputError(
                f"{file.name}: no column {', '.join(missing)}; expected the columns of {self.files[0].name}; give all "
                "files one schema, or name fewer of them in dataset.path"
            )
        for field in self._file_schema:
            found = plain_type(schema.field(field.name).type)
            try:
                if not found.equals(field.type):
                    pa.array([], found).cast(field.type)
            except pa.ArrowException:
                raise self.type_error(file, field, found) from None


def _without_unsound(column: pa.ChunkedArray, why: str) -> tuple[pa.ChunkedArray, dict[int, str]]:
    """The column with null in place of each value that is unsound, and why by position."""
    pieces: list[pa.Array] = []
    found: dict[int, str] = {}
    first = 0
    for chunk in column.chunks:
        for place in range(len(chunk)):
            try:
                chunk.slice(place, 1).validate(full=True)
            except pa.ArrowException as error:
                found[first + place] = str(error).splitlines()[0][:200]
        bad = np.array([first + place in found for place in range(len(chunk))], dtype=bool)
        pieces.append(_nulled(chunk, bad))
        first += len(chunk)
    if not found:
        raise InputError(f"a column is damaged ({why}); expected sound Arrow data; restore the file")
    return pa.chunked_array(pieces, column.type), found


def _nulled(chunk: pa.Array, bad: npt.NDArray[np.bool_]) -> pa.Array:
    try:
        return chunk.take(pa.array(np.arange(len(chunk)), mask=bad))
    except pa.ArrowNotImplementedError:  # for views
        values = [None if is_bad else chunk[place].as_py() for place, is_bad in enumerate(bad)]
        return pa.array(values, chunk.type)


def one_batch(table: pa.Table, chunk: Chunk) -> pa.RecordBatch:
    """A table as one record batch."""
    if table.num_rows == 0:
        return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in table.schema], schema=table.schema)
    batches = (
        table if all(column.num_chunks == 1 for column in table.columns) else table.combine_chunks()
    ).to_batches()
    if len(batches) != 1:
        raise InputError(
            f"{chunk.file}: chunk {chunk.index} has over 2 GiB in a column; expected less; lower dataset.chunk_rows"
        )
    return batches[0]


def row_numbers(start: int, stop: int) -> pa.Array:
    """int64 numbers from start to stop - 1."""
    return pa.array(np.arange(start, stop, dtype=np.int64))


def storage_of(array: pa.Array) -> pa.Array:
    """The array without its extension type."""
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def _cast(array: pa.Array, data_type: pa.DataType) -> pa.Array:
    if pa.types.is_run_end_encoded(array.type):
        array = pc.run_end_decode(array)
    # The cast of list views gives lists that are unsound: one offset too few (pyarrow 26.0.1, November 2026).
    return pa.array(array.to_pylist(), data_type) if _has_list_view(array.type) else array.cast(data_type)


def _has_list_view(data_type: pa.DataType) -> bool:
    if pa.types.is_list_view(data_type) or pa.types.is_large_list_view(data_type):
        return True
    return any(_has_list_view(data_type.field(index).type) for index in range(data_type.num_fields))


def unpacked_bytes(array: pa.Array) -> int:
    """The most that an array takes once each row has a value of its own, where that is more than it takes now."""
    if isinstance(array, pa.ExtensionArray):
        return unpacked_bytes(array.storage)
    if isinstance(array, pa.RunEndEncodedArray):
        return len(array) * _longest(array.values)
    if isinstance(array, pa.DictionaryArray):
        if not _has_length(array.dictionary.type):
            return len(array) * _longest(array.dictionary)
        lengths = pc.binary_length(array.dictionary).take(array.indices)
        return int(pc.sum(lengths.cast(pa.int64())).as_py() or 0)
    return 0


def _longest(values: pa.Array) -> int:
    if _has_length(values.type):
        return int(pc.max(pc.binary_length(values)).as_py() or 0)
    return 8 if not pa.types.is_nested(values.type) else int(values.nbytes)


def _has_length(data_type: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_string(data_type)
        or types.is_large_string(data_type)
        or types.is_binary(data_type)
        or types.is_large_binary(data_type)
    )


def _plain_schema(schema: pa.Schema, name: str) -> pa.Schema:
    if len(schema) > MAX_COLUMNS:
        raise InputError(
            f"{name}: {len(schema):,} columns; expected at most {MAX_COLUMNS:,}; keys that differ from row to row "
            "belong in one column, as text or a map"
        )
    duplicates = sorted(column for column, count in Counter(schema.names).items() if count > 1)
    if duplicates:
        raise InputError(f"{name}: columns {', '.join(duplicates)} are there twice; expected each name once")
    return pa.schema([pa.field(field.name, plain_type(field.type)) for field in schema])


def plain_type(data_type: pa.DataType) -> pa.DataType:
    """The type with one spelling of strings, lists and categories, so that files of different writers agree.

    Large and view variants become the ordinary ones, dictionaries their values, extension types their storage.
    """
    types = pa.types
    if isinstance(data_type, pa.BaseExtensionType):
        return plain_type(data_type.storage_type)
    if types.is_dictionary(data_type):
        return plain_type(data_type.value_type)
    if types.is_run_end_encoded(data_type):
        return plain_type(data_type.value_type)
    if types.is_timestamp(data_type) and data_type.unit == "s":
        return pa.timestamp("ms", data_type.tz)  # as in Parquet: what that cannot hold is found when it is read
    if types.is_large_string(data_type) or types.is_string_view(data_type):
        return pa.string()
    if types.is_large_binary(data_type) or types.is_binary_view(data_type):
        return pa.binary()
    if types.is_fixed_size_list(data_type):
        return pa.list_(_inner_type(data_type.value_type), data_type.list_size)
    if (
        types.is_list(data_type)
        or types.is_large_list(data_type)
        or types.is_list_view(data_type)
        or types.is_large_list_view(data_type)
    ):
        return pa.list_(_inner_type(data_type.value_type))
    if types.is_struct(data_type):
        return pa.struct([pa.field(field.name, _inner_type(field.type)) for field in data_type])
    if types.is_map(data_type):
        return pa.map_(plain_type(data_type.key_type), _inner_type(data_type.item_type))
    return data_type


def _inner_type(data_type: pa.DataType) -> pa.DataType:
    """Of what stands in a nested type. Nulls become strings there: Arrow takes rows out of such lists wrongly."""
    found = plain_type(data_type)
    return pa.string() if pa.types.is_null(found) else found
