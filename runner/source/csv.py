"""CSV as RFC 4180 has it: a header, quoted fields that may hold newlines, UTF-8; plain or compressed.

Row numbers count records behind the header, blank lines too, which are no rows. An empty field is null, a quoted empty
one is an empty string. The delimiter is a tab in .tsv files, else the first of `,` `;` tab `|` that the header holds. A
column whose first 10,000 values are all whole numbers, numbers or true/false has that type, else it is a string;
numbers with leading zeros stay strings. A record with too many or too few fields, or with a value that is not of its
column's type, makes an error row.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from runner.chunk import ROW_COLUMN, Chunk
from runner.config import DatasetConfig
from runner.errors import InputError
from runner.source.base import FileSource, Range
from runner.source.lines import QuotedScanner, RecordReader, Stream, scan
from runner.source.paths import InputFile, suffix

SUFFIXES = (".csv", ".tsv")
SAMPLE_ROWS = 10_000
SAMPLE_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"
_WHOLE = re.compile(r"-?(0|[1-9]\d*)")
_ZEROS = re.compile(r"[+-]?0\d")


def open(dataset: DatasetConfig, files: Sequence[InputFile]) -> CsvSource:
    """The rows of CSV files."""
    return CsvSource(dataset, files)


class _Header:
    """Names of a file's columns, its delimiter, and the byte where its records begin."""

    def __init__(self, file: InputFile) -> None:
        stream = Stream(file, 0)
        head = stream.next_block()
        stream.close()
        text = head.removeprefix(_BOM)
        first_line = text.split(b"\n", 1)[0].decode("utf-8", "replace")
        self.delimiter = "\t" if suffix(file.name) == ".tsv" else _delimiter(first_line)
        ends = QuotedScanner(self.delimiter).ends(text)
        length = int(ends[0]) if len(ends) else len(text)
        self.end = length + len(head) - len(text)
        try:
            record = text[:length].decode("utf-8")
            self.names = next(csv.reader(io.StringIO(record, newline=""), delimiter=self.delimiter), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{file.name}: header: {error}; expected UTF-8 column names; convert the file") from None


class CsvSource(FileSource):
    """Rows of CSV files."""

    every_row_counts = False

    def __init__(self, dataset: DatasetConfig, files: Sequence[InputFile]) -> None:
        self._reader: RecordReader | None = None
        self._headers: dict[str, _Header] = {}
        super().__init__(dataset, files)

    def infer_schema(self) -> pa.Schema:
        file = self.files[0]
        header = self._header(file)
        data = RecordReader(file).read(header.end, SAMPLE_ROWS, QuotedScanner(header.delimiter), SAMPLE_BYTES)
        data = data[:SAMPLE_BYTES]
        ends = QuotedScanner(header.delimiter).ends(data)
        parsed, _, _ = parse_records(data[: int(ends[-1])] if len(ends) else data, header.names, header.delimiter)
        return pa.schema([pa.field(name, infer_type(parsed[i])) for i, name in enumerate(header.names)])

    def ranges(self, file: InputFile) -> Iterator[Range]:
        header = self._header(file)
        self.check_columns(file, pa.schema([pa.field(name, pa.string()) for name in header.names]))
        return scan(file, QuotedScanner(header.delimiter), self.dataset.chunk_rows, header.end)

    def read_range(self, file: InputFile, chunk: Chunk, columns: list[str]) -> pa.Table:
        header = self._header(file)
        if self._reader is None or self._reader.file.name != file.name:
            self._reader = RecordReader(file)
        data = self._reader.read(chunk.locator, chunk.num_rows, QuotedScanner(header.delimiter))
        if len(data) >= 2**31:
            raise InputError(
                f"{file.name}: chunk {chunk.index} has over 2 GiB; expected less; lower dataset.chunk_rows"
            )
        parsed, records, broken = parse_records(data, header.names, header.delimiter)
        arrays: dict[str, pa.Array] = {}
        misfits: dict[str, dict[int, str]] = {}
        for name in columns:
            arrays[name], misfits[name] = convert(parsed[header.names.index(name)], self.schema.field(name).type)
        arrays[ROW_COLUMN] = pa.array(records + chunk.start)
        arrays |= self.error_columns(len(records), broken, misfits)
        return pa.Table.from_arrays(list(arrays.values()), list(arrays))

    def _header(self, file: InputFile) -> _Header:
        if file.name not in self._headers:
            self._headers = {file.name: _Header(file)}
        return self._headers[file.name]


def parse_records(data: bytes, names: list[str], delimiter: str) -> tuple[list[pa.Array], np.ndarray, dict[int, str]]:
    """Binary columns of the records, the ordinal of each row's record, and by position why a record has no fields."""
    begins = record_begins(data, delimiter)
    num_records = len(begins) - 1
    invalid: list[tuple[int, str]] = []

    def skip(row: pa_csv.InvalidRow) -> str:
        why = f"{row.actual_columns} fields; expected {row.expected_columns}" if row.text.strip() else ""
        invalid.append((row.number, why))
        return "skip"

    if not names or not data:
        return [pa.array([], pa.binary()) for _ in names], np.zeros(0, np.int64), {}
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(data),
            read_options=pa_csv.ReadOptions(use_threads=False, column_names=_unique(names), block_size=len(data) + 1),
            parse_options=pa_csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, ignore_empty_lines=False, invalid_row_handler=skip
            ),
            convert_options=pa_csv.ConvertOptions(
                column_types={name: pa.binary() for name in _unique(names)},
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowException:
        return _parse_slowly(data, names, delimiter)
    if table.num_rows + len(invalid) != num_records:
        return _parse_slowly(data, names, delimiter)
    columns = [column.combine_chunks() for column in table.columns]
    return _merge(columns, _blank(data, begins), {number - 1: why for number, why in invalid})


def record_begins(data: bytes, delimiter: str) -> np.ndarray:
    """Offset of each record, and the end of the last, which needs no newline."""
    ends = QuotedScanner(delimiter).ends(data)
    tail = [] if len(ends) and ends[-1] == len(data) else [len(data)]
    return np.concatenate([[0], ends, tail]).astype(np.int64)


def _blank(data: bytes, begins: np.ndarray) -> np.ndarray:
    """For each record, whether it is an empty line."""
    lengths = np.diff(begins)
    first = np.frombuffer(data, np.uint8)[begins[:-1]]
    return ((lengths == 1) & (first == ord("\n"))) | ((lengths == 2) & (first == ord("\r")))


def _merge(
    columns: list[pa.Array], blank: np.ndarray, invalid: dict[int, str]
) -> tuple[list[pa.Array], np.ndarray, dict[int, str]]:
    """Columns with a row of nulls for each invalid record, and none for blank lines."""
    records = np.arange(len(blank), dtype=np.int64)
    sound = np.ones(len(blank), dtype=bool)
    sound[list(invalid)] = False
    present = ~blank
    present[[number for number, why in invalid.items() if not why]] = False
    places = np.where(sound, np.cumsum(sound) - 1, -1)[present]
    if len(places) != len(columns[0]) or (places < 0).any():
        take = pa.array(places, mask=places < 0)
        columns = [column.take(take) for column in columns]
    records = records[present]
    positions = {int(record): position for position, record in enumerate(records) if int(record) in invalid}
    return columns, records, {positions[number]: why for number, why in invalid.items() if why}


def _parse_slowly(data: bytes, names: list[str], delimiter: str) -> tuple[list[pa.Array], np.ndarray, dict[int, str]]:
    """Record by record, for what a strict parser of whole blocks gives up on."""
    begins = record_begins(data, delimiter)
    rows: list[list[bytes | None]] = []
    invalid: dict[int, str] = {}
    for number, (begin, end) in enumerate(itertools.pairwise(begins.tolist())):
        text = data[begin:end].decode("utf-8", "surrogateescape")
        try:
            fields = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
        except csv.Error as error:
            invalid[number] = str(error)
            continue
        if len(fields) == len(names):
            rows.append([field.encode("utf-8", "surrogateescape") or None for field in fields])
        else:
            invalid[number] = f"{len(fields)} fields; expected {len(names)}" if text.strip() else ""
    columns = [pa.array([row[index] for row in rows], pa.binary()) for index in range(len(names))]
    return _merge(columns, _blank(data, begins), invalid)


def infer_type(column: pa.Array) -> pa.DataType:
    """int64, double, bool or string, whichever holds all values of a binary column."""
    values = [value.decode("utf-8", "replace").strip() for value in column.drop_null().to_pylist()]
    if not values or any(_ZEROS.match(value) and not value.startswith(("0.", "-0.")) for value in values):
        return pa.string()
    if all(_WHOLE.fullmatch(value) for value in values):
        data_type = pa.int64()
    elif all(value.lower() in ("true", "false") for value in values):
        data_type = pa.bool_()
    else:
        data_type = pa.float64()
    try:
        pa.array(values).cast(data_type)
    except pa.ArrowException:
        return pa.string()
    return data_type


def convert(column: pa.Array, data_type: pa.DataType) -> tuple[pa.Array, dict[int, str]]:
    """A binary column in its type, and by position the values that are not of it, which become null."""
    try:
        return _cast(column, data_type), {}
    except pa.ArrowException:
        pass
    result, misfits = [], {}
    for position, value in enumerate(column.to_pylist()):
        try:
            result.append(_cast(pa.array([value], pa.binary()), data_type)[0].as_py())
        except pa.ArrowException:
            text = repr(value.decode("utf-8", "backslashreplace"))
            expected = "text in UTF-8" if pa.types.is_string(data_type) else data_type
            misfits[position] = f"found {text if len(text) <= 60 else text[:57] + '...'}; expected {expected}"
            result.append(None)
    return pa.array(result, data_type), misfits


def _cast(column: pa.Array, data_type: pa.DataType) -> pa.Array:
    text = column.cast(pa.string())
    if pa.types.is_string(data_type):
        return text
    trimmed = pc.utf8_trim_whitespace(text)
    return pc.if_else(pc.equal(trimmed, ""), None, trimmed).cast(data_type)


def _unique(names: list[str]) -> list[str]:
    return [f"{index}" for index in range(len(names))]


def _delimiter(header: str) -> str:
    return next((character for character in ",;\t|" if character in header), ",")
