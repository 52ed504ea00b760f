"""The chunks that are open: read, not yet committed. Between the task, which makes columns, and journal and sink.

Finished rows of an open chunk are kept as Arrow tables in the schema of a part; nothing is kept for a row but its
place in them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engines.api import Outcome
from runner.chunk import FILE_COLUMN, ROW_COLUMN, Chunk
from runner.config import JobConfig
from runner.errors import RowError
from runner.tasks import Task

CODE_COLUMN = "error_code"
MESSAGE_COLUMN = "error_message"
OWN_COLUMNS = (FILE_COLUMN, ROW_COLUMN, CODE_COLUMN, MESSAGE_COLUMN)
Result = Sequence[Outcome] | RowError
"""What came of a row: the outcomes of its requests in order, or why there are none."""


class Layout:
    """Columns of the output, and which of the input's they carry over.

    Args:
        source: Schema of the input.
    """

    def __init__(self, job: JobConfig, source: pa.Schema, task: Task) -> None:
        names = source.names if job.output.keep_columns is None else job.output.keep_columns
        id_column = [] if job.dataset.id_column is None else [job.dataset.id_column]
        self.kept = list(dict.fromkeys([*id_column, *names]))
        """Input columns that are carried over, in the order of the output."""
        taken = {*task.schema.names, *OWN_COLUMNS, *self.kept}
        self.renamed: dict[str, str] = {}
        """New names of those that another column of the output has."""
        for name in self.kept:
            if name in task.schema.names or name in OWN_COLUMNS:
                self.renamed[name] = _free_name(f"{name}_input", taken)
                taken.add(self.renamed[name])
        self.task = task
        self.schema = pa.schema(
            [
                pa.field(FILE_COLUMN, pa.string()),
                pa.field(ROW_COLUMN, pa.int64()),
                *(pa.field(self.renamed.get(name, name), source.field(name).type) for name in self.kept),
                *(field.remove_metadata() for field in task.schema),
                pa.field(CODE_COLUMN, pa.string()),
                pa.field(MESSAGE_COLUMN, pa.string()),
            ]
        )
        wanted = [*self.kept, *task.columns, *job.sampling_columns.values()]
        if job.model.adapter_column is not None:
            wanted.append(job.model.adapter_column)
        self.columns = list(dict.fromkeys(wanted))
        """Input columns to be read."""

    def table(self, file: str, batch: pa.RecordBatch, results: Sequence[Result]) -> pa.Table:
        """Rows of a part. batch: these rows of the input; results: what came of each of them."""
        codes: list[str | None] = [None] * len(results)
        messages: list[str | None] = [None] * len(results)
        for place, result in enumerate(results):
            if isinstance(result, RowError):
                codes[place], messages[place] = result.code, result.message
        arrays = [
            pa.repeat(pa.scalar(file, pa.string()), len(results)),
            batch.column(ROW_COLUMN),
            *(batch.column(name) for name in self.kept),
            *self.task.outputs(results).columns,
            pa.array(codes, pa.string()),
            pa.array(messages, pa.string()),
        ]
        return pa.Table.from_arrays(arrays, schema=self.schema)


class OpenChunk:
    """A chunk whose rows are being processed.

    Args:
        batch: The rows to be processed.
        finished: The other rows of the chunk, which a journal or an earlier part has; None if there are none.
        generation: Of the part that this will become.
    """

    def __init__(
        self, chunk: Chunk, layout: Layout, batch: pa.RecordBatch, finished: pa.Table | None, generation: int
    ) -> None:
        self.chunk = chunk
        self.batch = batch
        self.generation = generation
        self.num_left = batch.num_rows
        """Rows without a result."""
        self.num_errors = 0 if finished is None else num_errors(finished)
        self._layout = layout
        self._kept = batch.select([*layout.kept, ROW_COLUMN])
        self._tables = [layout.schema.empty_table() if finished is None else finished]
        self._places: list[int] = []
        self._results: list[Result] = []

    @property
    def num_buffered(self) -> int:
        """Rows with a result that are not in a table yet."""
        return len(self._results)

    def add(self, place: int, result: Result) -> None:
        """Note what came of the row at this place of the batch."""
        self._places.append(place)
        self._results.append(result)
        self.num_left -= 1
        if isinstance(result, RowError):
            self.num_errors += 1

    def flush(self) -> pa.Table | None:
        """The rows that got a result since the last call, as rows of a part; None if there are none."""
        if not self._results:
            return None
        rows = self._kept.take(pa.array(self._places, pa.int64()))
        table = self._layout.table(self.chunk.file, rows, self._results)
        self._places, self._results = [], []
        self._tables.append(table)
        return table

    def table(self) -> pa.Table:
        """All rows that were flushed, in input order."""
        table = pa.concat_tables(self._tables)
        rows: npt.NDArray[np.int64] = table.column(ROW_COLUMN).to_numpy()
        if np.all(np.diff(rows) > 0):
            return table
        return table.take(pa.array(np.argsort(rows, kind="stable")))


def num_errors(table: pa.Table) -> int:
    """Rows of a part that ended in an error."""
    return table.num_rows - table.column(CODE_COLUMN).null_count


def without(batch: pa.RecordBatch, finished: pa.Table | None) -> pa.RecordBatch:
    """The rows of a batch that are not in a table of finished ones."""
    if finished is None or not finished.num_rows:
        return batch
    rows = batch.column(ROW_COLUMN).to_numpy()
    return batch.filter(pa.array(~np.isin(rows, finished.column(ROW_COLUMN).to_numpy())))


def _free_name(name: str, taken: set[str]) -> str:
    return _free_name(f"{name}_input", taken) if name in taken else name
