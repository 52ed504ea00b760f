"""JSON Lines, plain or compressed with gzip, zstd or bz2: one object a line. Row numbers are line numbers, from 0.

A line that is not a JSON object, and a value that is not of its column's type, make an error row; blank lines are no
rows. Integers beyond 64 bits become doubles, as in most readers: long identifiers are to be strings. Types come from
the first 10,000 rows of the first file and the first 200 of some others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson
import pyarrow as pa

from runner.chunk import ROW_COLUMN, Chunk
from runner.config import DatasetConfig
from runner.errors import InputError
from runner.source import values
from runner.source.base import FileSource, Range
from runner.source.lines import LineScanner, RecordReader, scan
from runner.source.paths import UNREADABLE, InputFile, reason

SUFFIXES = (".jsonl", ".ndjson", ".json")
SAMPLE_ROWS = 10_000
SAMPLE_BYTES = 16 << 20
OTHER_FILES = 15
OTHER_ROWS = 200
_BOM = b"\xef\xbb\xbf"


def open(dataset: DatasetConfig, files: Sequence[InputFile]) -> JsonLinesSource:
    """The rows of JSON Lines files."""
    return JsonLinesSource(dataset, files)


class JsonLinesSource(FileSource):
    """Rows of JSON Lines files."""

    every_row_counts = False

    def __init__(self, dataset: DatasetConfig, files: Sequence[InputFile]) -> None:
        self._reader: RecordReader | None = None
        super().__init__(dataset, files)

    def infer_schema(self) -> pa.Schema:
        step = max(1, len(self.files) // OTHER_FILES)
        samples = [(self.files[0], SAMPLE_ROWS)]
        samples += [(file, OTHER_ROWS) for file in self.files[1::step]]
        rows: list[dict[str, Any]] = []
        for file, num_rows in samples:
            rows += self._sample(file, num_rows)
        if not rows:
            return pa.schema([])
        return values.infer_schema(rows)

    def _sample(self, file: InputFile, num_rows: int) -> list[dict[str, Any]]:
        lines = _head(file, num_rows).splitlines()
        if lines and lines[0].removeprefix(_BOM).lstrip().startswith(b"["):
            raise InputError(
                f"{file.name}: begins with '['; expected one JSON object a line; convert it: jq -c '.[]' in > out.jsonl"
            )
        parsed = [parse_line(line)[0] for line in lines[:num_rows]]
        rows = [row for row in parsed if row is not None]
        if not rows and any(line.strip() for line in lines):
            raise InputError(
                f"{file.name}: none of its first lines is a JSON object ({parse_line(lines[0])[1]}); expected JSON "
                "Lines; check the file and dataset.format"
            )
        return rows

    def ranges(self, file: InputFile) -> Iterator[Range]:
        return scan(file, LineScanner(), self.dataset.chunk_rows)

    def read_range(self, file: InputFile, chunk: Chunk, columns: list[str]) -> pa.Table:
        if self._reader is None or self._reader.file.name != file.name:
            self._reader = RecordReader(file)
        data = self._reader.read(chunk.locator, chunk.num_rows, LineScanner())
        if chunk.locator == 0:
            data = data.removeprefix(_BOM)
        rows: list[dict[str, Any]] = []
        numbers: list[int] = []
        broken: dict[int, str] = {}
        for number, line in enumerate(data.split(b"\n")[: chunk.num_rows], chunk.start):
            row, error = parse_line(line)
            if error is not None:
                broken[len(rows)] = error
            elif row is None:
                continue
            rows.append(row or {})
            numbers.append(number)
        return self.table(rows, numbers, broken, columns)

    def table(
        self, rows: list[dict[str, Any]], numbers: list[int], broken: dict[int, str], columns: list[str]
    ) -> pa.Table:
        """Columns out of parsed rows; `broken`: why a row has no values, by position."""
        arrays: dict[str, pa.Array] = {}
        misfits: dict[str, dict[int, str]] = {}
        for name in columns:
            arrays[name], misfits[name] = values.column([row.get(name) for row in rows], self.schema.field(name).type)
        arrays[ROW_COLUMN] = pa.array(numbers, pa.int64())
        arrays |= self.error_columns(len(rows), broken, misfits)
        return pa.Table.from_arrays(list(arrays.values()), list(arrays))


def parse_line(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """The object of a line; (None, None) for a blank one; (None, why) if there is no object in it."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if not line.strip():
            return None, None
        return None, f"not valid JSON ({error}); expected one object a line"
    if isinstance(row, dict):
        return row, None
    return None, f"a JSON {type(row).__name__}; expected one object a line"


def _head(file: InputFile, num_rows: int) -> bytes:
    """Whole lines from the beginning of a file: about `num_rows`, and no more bytes than SAMPLE_BYTES allows."""
    data = b""
    with file.open_stream() as stream:
        while len(data) < SAMPLE_BYTES and data.count(b"\n") < num_rows:
            try:
                block = stream.read(1 << 20)
            except UNREADABLE as error:
                raise InputError(
                    f"{file.name}: {reason(error)}; expected a whole {file.compression or 'plain'} file; restore it"
                ) from None
            if not block:
                return data.removeprefix(_BOM)
            data += block
    return data[: data.rfind(b"\n") + 1].removeprefix(_BOM) or data
