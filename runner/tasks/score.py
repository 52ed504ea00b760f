"""The log-probability of each token of a given text, and its perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from engines.api import Kind, Outcome
from engines.checkpoint import Checkpoint
from runner.config import JobConfig, TaskConfig
from runner.errors import RowError
from runner.prompt import Template, Tokenizer
from runner.tasks import RowRequests
from runner.tasks._common import Prompt, Requests, Result, column, good, unreadable
from runner.tasks.generate import encoded

KIND: Kind = "score"


@dataclass(frozen=True)
class Config(TaskConfig):
    """The log-probability of each token of a given text, and its perplexity."""

    continuation: str
    """Jinja template over the columns of a row: what is scored."""
    prompt: str = ""
    """Jinja template over the columns of a row: what comes before, and is not scored. Empty: the text alone."""


class Score:
    """Prompt and continuation are tokenized apart, so that what is scored does not depend on where they meet.

    A continuation with nothing before it, not even a beginning-of-sequence token, is scored from its second token on.
    """

    kind: Kind = KIND

    def __init__(self, job: JobConfig, tokenizer: Tokenizer, limit: int, config: Config) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        self._prompt = Template(config.prompt, "task.prompt")
        self._continuation = Template(config.continuation, "task.continuation")
        self._requests = Requests(job, KIND)
        self.columns = sorted({*self._prompt.columns, *self._continuation.columns})
        self.schema = pa.schema(
            [
                ("logprobs", pa.list_(pa.float32())),
                ("logprob_sum", pa.float64()),
                ("logprob_mean", pa.float64()),
                ("perplexity", pa.float64()),
                ("num_scored_tokens", pa.int32()),
                ("num_prompt_tokens", pa.int32()),
            ]
        )

    def requests(self, batch: pa.RecordBatch, file: str, first_id: int) -> list[RowRequests]:
        bad = unreadable(batch)
        before = encoded(self._tokenizer, self._prompt.render(batch), bad, True)
        after = encoded(self._tokenizer, self._continuation.render(batch), bad, False)
        prompts: list[Prompt] = []
        starts: list[int] = []
        for context, text in zip(before, after, strict=True):
            prompt, start = self._joined(context, text)
            prompts.append(prompt)
            starts.append(start)
        return self._requests.make(batch, file, first_id, prompts, starts)

    def _joined(self, context: Prompt, text: Prompt) -> tuple[Prompt, int]:
        if isinstance(context, RowError):
            return context, 0
        if isinstance(text, RowError):
            return text, 0
        ids, start = context + text, max(len(context), 1)
        if start >= len(ids):
            return RowError("empty_continuation", "the continuation has no tokens to score; filter such rows"), 0
        if len(ids) > self._limit:
            return RowError("too_long", f"the text has {len(ids)} tokens; the model takes at most {self._limit}"), 0
        return ids, start

    def outputs(self, results: Sequence[Result]) -> pa.RecordBatch:
        def total(o: Outcome) -> float:
            return math.fsum(o.values or ())

        def count(o: Outcome) -> int:
            return len(o.values or ())

        rows = good(results)
        columns = [
            column(rows, pa.list_(pa.float32()), 1, lambda o: o.values),
            column(rows, pa.float64(), 1, total),
            column(rows, pa.float64(), 1, lambda o: total(o) / count(o)),
            column(rows, pa.float64(), 1, lambda o: math.exp(min(-total(o) / count(o), 700.0))),
            column(rows, pa.int32(), 1, count),
            column(rows, pa.int32(), 1, lambda o: o.num_prompt_tokens),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def build(job: JobConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, max_model_len: int) -> Score:
    config = job.task
    assert isinstance(config, Config)
    return Score(job, tokenizer, max_model_len, config)
