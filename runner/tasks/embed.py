"""A vector for a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from engines.api import Kind, bounded
from engines.checkpoint import Checkpoint
from runner.config import JobConfig, TaskConfig
from runner.errors import InputError
from runner.prompt import Tokenizer
from runner.tasks import RowRequests
from runner.tasks._common import ON_TOO_LONG, Input, Limit, Requests, Result, Row, column, good

KIND: Kind = "embed"


@dataclass(frozen=True)
class Config(TaskConfig):
    """A vector for a text."""

    text: str
    """Jinja template over the columns of a row. Some models want a prefix: "query: {{ text }}"."""
    pooling: str | None = bounded(None, choices=("cls", "mean", "max", "last"))
    """How hidden states become one vector; null: as the checkpoint's sentence-transformers files say."""
    normalize: bool | None = None
    """Scale vectors to length 1; null: as the checkpoint's sentence-transformers files say."""
    on_too_long: str = bounded("truncate_right", choices=ON_TOO_LONG)
    """A text longer than the model takes: an error of its row, or cut on that side, with input_truncated set."""


class TextTask:
    """One request for each row's text."""

    kind: Kind

    def __init__(self, job: JobConfig, text: Input, limit: Limit, kind: Kind) -> None:
        self.kind = kind
        self._text, self._limit = text, limit
        self._requests = Requests(job, kind)
        self.columns = text.columns

    def requests(self, batch: pa.RecordBatch, file: str, first_id: int) -> list[RowRequests]:
        prompts = [self._limit.fit(prompt, first_id + i) for i, prompt in enumerate(self._text.encode(batch))]
        return self._requests.make(batch, file, first_id, prompts)

    def counts(self, rows: Sequence[Row]) -> list[pa.Array]:
        """num_prompt_tokens and input_truncated."""
        return [
            column(rows, pa.int32(), 1, lambda o: o.num_prompt_tokens),
            column(rows, pa.bool_(), 1, lambda o: self._limit.was_cut(o.request_id)),
        ]


COUNTS = [("num_prompt_tokens", pa.int32()), ("input_truncated", pa.bool_())]


class Embed(TextTask):
    def __init__(self, job: JobConfig, text: Input, limit: Limit, size: int) -> None:
        super().__init__(job, text, limit, KIND)
        self._vector = pa.list_(pa.float32(), size)
        self.schema = pa.schema([("embedding", self._vector), *COUNTS])

    def outputs(self, results: Sequence[Result]) -> pa.RecordBatch:
        rows = good(results)
        vectors = column(rows, self._vector, 1, lambda o: o.values)
        return pa.RecordBatch.from_arrays([vectors, *self.counts(rows)], schema=self.schema)


def build(job: JobConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, max_model_len: int) -> Embed:
    config = job.task
    assert isinstance(config, Config)
    limit = Limit(max_model_len, "task.text", config.on_too_long, tokenizer.around)
    return Embed(job, Input(config.text, "task.text", tokenizer), limit, _size(checkpoint))


def _size(checkpoint: Checkpoint) -> int:
    """Length of the hidden states."""
    inner = checkpoint.config.get("text_config")
    for config in (checkpoint.config, inner if isinstance(inner, dict) else {}):
        for name in ("hidden_size", "n_embd", "d_model", "dim"):
            if isinstance(size := config.get(name), int):
                return size
    raise InputError(f"{checkpoint.path}/config.json: no hidden_size; expected the length of a vector; add it")
