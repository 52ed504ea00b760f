"""What is done with a row. One module a task, found by its file name.

A task module exports `Config` (a TaskConfig subclass whose fields are the task's YAML keys), `KIND` (what it asks of
the engine: an engines.api.Kind) and `build(job, checkpoint, tokenizer, max_model_len)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from engines import discover
from engines.api import Kind, Outcome, Request
from runner.errors import RowError

if TYPE_CHECKING:
    from engines.checkpoint import Checkpoint
    from runner.config import JobConfig
    from runner.prompt import Tokenizer

RowRequests = Sequence[Request] | RowError
"""The requests of one row (one a sample), or why there are none."""


class Task(Protocol):
    """Turns rows into requests, and outcomes into output columns."""

    kind: Kind
    columns: list[str]
    """Input columns that the task reads."""
    schema: pa.Schema
    """Output columns, fixed by configuration and model alone, whatever the rows hold."""

    def requests(self, batch: pa.RecordBatch, file: str, first_id: int) -> list[RowRequests]:
        """Requests of each row of the batch, which has ROW_COLUMN; ids count up from first_id, `samples` to a row.

        A row that cannot become a request is a RowError in its place; nothing else is raised for a row's sake.
        """

    def outputs(self, results: Sequence[Sequence[Outcome] | RowError]) -> pa.RecordBatch:
        """Output columns of these rows, in `schema`; one output row for each element."""


def build_task(job: JobConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, max_model_len: int) -> Task:
    """The task that job.task names. Raises ConfigError for a template that cannot be read."""
    module = discover.modules("runner.tasks")[job.task.name]
    task: Task = module.build(job, checkpoint, tokenizer, max_model_len)
    return task
