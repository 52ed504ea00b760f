"""mode=verify: whether an output is what its ledger and its input say. Reads everything, changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from runner.chunk import FILE_COLUMN, ROW_COLUMN, Part
from runner.errors import Interrupted, OutputError, RunnerError
from runner.ledger import Ledger
from runner.source import Source
from runner.storage import PARTS_FOLDER

MAX_PROBLEMS = 20
"""Problems that a report lists; the others are counted."""
ERROR_CODE_COLUMN = "error_code"


@dataclass
class Report:
    """What was found in an output folder."""

    folder: str
    finished: bool
    """The success mark is there."""
    num_parts: int = 0
    num_rows: int = 0
    num_errors: int = 0
    """Rows with an error code."""
    num_bytes: int = 0
    num_missing: int | None = None
    """Chunks of the input that are not committed; None if there was no source to compare with."""
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    """The first of them."""

    @property
    def exit_code(self) -> int:
        """0: right and complete; 75: right as far as it goes, run the job again; 4: damaged or wrong."""
        if self.num_problems:
            return OutputError.exit_code
        complete = self.finished if self.num_missing is None else self.num_missing == 0
        return 0 if complete else Interrupted.exit_code

    def text(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{self.folder}: {self.num_parts} parts, {self.num_rows} rows, {self.num_errors} of them errors, "
            f"{self.num_bytes} bytes",
            f"success mark: {'yes' if self.finished else 'no'}",
        ]
        if self.num_missing is None:
            lines.append("input: not compared")
        else:
            lines.append(f"input: {self.num_missing} chunks are not done" if self.num_missing else "input: all done")
        lines += [f"problem: {problem}" for problem in self.problems]
        if self.num_problems > len(self.problems):
            lines.append(f"... and {self.num_problems - len(self.problems)} more problems")
        lines.append({0: "complete", 75: "half done, and right so far"}.get(self.exit_code, "NOT RIGHT"))
        return "\n".join(lines)

    def add(self, problem: str) -> None:
        self.num_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)


def verify(folder: str, source: Source | None) -> Report:
    """Check each committed part, and with a source that the parts hold exactly the input's rows.

    One part and one chunk are in memory at a time. Raises OutputError if the folder is no job's.
    """
    ledger = Ledger.existing(folder)
    parts = ledger.done()
    report = Report(folder, ledger.finished)
    checker = _Checker(ledger, report)
    if source is None:
        for index in sorted(parts):
            checker.part(parts[index], None)
    else:
        report.num_missing = 0
        for chunk in source.chunks():
            part = parts.pop(chunk.index, None)
            if part is None:
                report.num_missing += 1
                continue
            try:
                ledger.check(chunk)
                expected = source.read(chunk, []).column(ROW_COLUMN).to_numpy()
            except RunnerError as error:
                report.add(str(error))
                expected = None
            checker.part(part, expected)
        for part in parts.values():
            report.add(f"{part.path}: chunk {part.chunk.index}; expected none behind the end of the input")
    for name in ledger.strays():
        report.add(f"{PARTS_FOLDER}/{name}: in no ledger entry; expected committed parts only; remove it")
    if report.finished and report.num_missing:
        report.add(f"success mark: there, with {report.num_missing} chunks not done; expected none")
    return report


class _Checker:
    def __init__(self, ledger: Ledger, report: Report) -> None:
        self.ledger = ledger
        self.report = report
        self.schema: pa.Schema | None = None
        """Of the first part; all others must have it."""

    def part(self, part: Part, expected: np.ndarray | None) -> None:
        """Check a part's bytes, schema and rows; `expected`: its row numbers, None if they are not known."""
        report = self.report
        report.num_parts += 1
        storage = self.ledger.storage
        data = storage.read(part.path)
        if data is None or xxhash.xxh3_128_hexdigest(data) != part.checksum:
            staged = storage.read(part.staged)
            if staged is not None and xxhash.xxh3_128_hexdigest(staged) == part.checksum:
                data = staged  # committed and not yet published: the job's next run does that
            elif data is None:
                report.add(f"{part.path}: missing; expected {part.num_rows} rows of chunk {part.chunk.index}")
                return
            else:
                report.add(f"{part.path}: its bytes are not those that were committed; expected {part.checksum}")
                return
        report.num_bytes += len(data)
        self._content(part, data, expected)

    def _content(self, part: Part, data: bytes, expected: np.ndarray | None) -> None:
        report = self.report
        file = pq.ParquetFile(pa.BufferReader(data))
        schema = file.schema_arrow.remove_metadata()
        if self.schema is None:
            self.schema = schema
        elif not schema.equals(self.schema):
            report.add(f"{part.path}: schema {schema}; expected that of the other parts")
        columns = [name for name in (FILE_COLUMN, ROW_COLUMN, ERROR_CODE_COLUMN) if name in schema.names]
        table = file.read(columns, use_threads=False)
        report.num_rows += table.num_rows
        if ERROR_CODE_COLUMN in columns:
            num_errors = table.num_rows - table.column(ERROR_CODE_COLUMN).null_count
            report.num_errors += num_errors
            if num_errors != part.num_errors:
                report.add(f"{part.path}: {num_errors} rows with errors; expected {part.num_errors}")
        if table.num_rows and not pc.all(pc.equal(table.column(FILE_COLUMN), part.chunk.file)).as_py():
            report.add(f"{part.path}: rows of other files; expected {part.chunk.file} alone")
        rows = table.column(ROW_COLUMN).to_numpy()
        if len(rows) != part.num_rows:
            report.add(f"{part.path}: {len(rows)} rows; expected {part.num_rows}")
        if expected is None:
            stop = part.chunk.start + part.chunk.num_rows
            if len(rows) and (rows[0] < part.chunk.start or rows[-1] >= stop or not np.all(np.diff(rows) > 0)):
                report.add(f"{part.path}: rows twice, out of order or of another chunk")
        elif not np.array_equal(rows, expected):
            report.add(f"{part.path}: {_difference(rows, expected)}")


def _difference(rows: np.ndarray, expected: np.ndarray) -> str:
    absent, surplus = np.setdiff1d(expected, rows), np.setdiff1d(rows, expected)
    twice = len(rows) - len(np.unique(rows))
    if not len(absent) and not len(surplus) and not twice:
        return "rows out of order; expected the input's"
    return (
        f"{len(absent)} rows missing{_first(absent)}, {len(surplus)} too many{_first(surplus)}, {twice} twice; "
        f"expected the {len(expected)} rows of the input"
    )


def _first(rows: np.ndarray) -> str:
    return f" (row {rows[0]} ...)" if len(rows) else ""
