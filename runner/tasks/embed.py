"""A vector for a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from engines.api import Kind
from engines.checkpoint import Checkpoint
from runner.config import JobConfig, TaskConfig
from runner.errors import RowError
from runner.prompt import Template, Tokenizer
from runner.tasks import RowRequests
from runner.tasks._common import Prompt, Requests, Result, Row, column, good, unreadable
from runner.tasks.generate import encoded

KIND: Kind = "embed"


@dataclass(frozen=True)
class Config(TaskConfig):
    """A vector for a text."""

    text: str
    """Jinja template over the columns of a row. Some models want a prefix: "query: {{ text }}"."""
    pooling: str | None = field(default=None, metadata={"choices": ("cls", "mean", "max", "last")})
    """How hidden states become one vector; null: as the checkpoint's sentence-transformers files say."""
    normalize: bool | None = None
    """Scale vectors to length 1; null: as the checkpoint's sentence-transformers files say."""


class TextTask:
    """One request for each row's text; a text that is too long is cut at its end, with input_truncated set."""

    kind: Kind

    def __init__(self, job: JobConfig, tokenizer: Tokenizer, limit: int, text: str, kind: Kind) -> None:
        self.kind = kind
        self._template = Template(text, "task.text")
        self._tokenizer = tokenizer
        self._limit = limit
        self._requests = Requests(job, kind)
        self._truncated: set[int] = set()
        self.columns = self._template.columns

    def requests(self, batch: pa.RecordBatch, file: str, first_id: int) -> list[RowRequests]:
        prompts = encoded(self._tokenizer, self._template.render(batch), unreadable(batch), True)
        return self._requests.make(batch, file, first_id, [self._cut(p, first_id + i) for i, p in enumerate(prompts)])

    def _cut(self, prompt: Prompt, request_id: int) -> Prompt:
        """Tokens that end a text, [SEP] or the like, stay at its end."""
        if isinstance(prompt, RowError) or len(prompt) <= self._limit:
            return prompt
        self._truncated.add(request_id)
        end = self._tokenizer.encode([""], True)[0]
        last = end[-1:] if len(end) > 1 and prompt[-1] == end[-1] else []
        return prompt[: self._limit - len(last)] + last

    def counts(self, rows: Sequence[Row]) -> list[pa.Array]:
        """num_prompt_tokens and input_truncated."""
        flags = [None if row is None else row[0].request_id in self._truncated for row in rows]
        self._truncated.difference_update(row[0].request_id for row in rows if row is not None)
        return [column(rows, pa.int32(), 1, lambda o: o.num_prompt_tokens), pa.array(flags, pa.bool_())]


COUNTS = [("num_prompt_tokens", pa.int32()), ("input_truncated", pa.bool_())]


class Embed(TextTask):
    def __init__(self, job: JobConfig, tokenizer: Tokenizer, limit: int, text: str, size: int) -> None:
        super().__init__(job, tokenizer, limit, text, KIND)
        self._vector = pa.list_(pa.float32(), size)
        self.schema = pa.schema([("embedding", self._vector), *COUNTS])

    def outputs(self, results: Sequence[Result]) -> pa.RecordBatch:
        rows = good(results)
        vectors = column(rows, self._vector, 1, lambda o: o.values)
        return pa.RecordBatch.from_arrays([vectors, *self.counts(rows)], schema=self.schema)


def build(job: JobConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, max_model_len: int) -> Embed:
    config = job.task
    assert isinstance(config, Config)
    text_config = checkpoint.config.get("text_config", checkpoint.config)
    size = next(text_config[key] for key in ("hidden_size", "n_embd", "d_model") if key in text_config)
    return Embed(job, tokenizer, max_model_len, config.text, size)
