"""The log-probability of each token of a given text, and its perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from engines.api import Kind, Outcome
from engines.checkpoint import Checkpoint
from runner.config import JobConfig, TaskConfig
from runner.errors import EMPTY_INPUT, RowError
from runner.prompt import Tokenizer
from runner.tasks import RowRequests
from runner.tasks._common import Input, Prompt, Requests, Result, column, good, too_long

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
        self._limit = limit
        self._behind = tokenizer.around[1]
        self._prompt = Input(config.prompt, "task.prompt", tokenizer)
        self._continuation = Input(config.continuation, "task.continuation", tokenizer, add_special=False)
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
        prompts: list[Prompt] = []
        starts: list[int] = []
        for context, text in zip(self._prompt.encode(batch), self._continuation.encode(batch), strict=True):
            prompt, start = self._joined(context, text)
            prompts.append(prompt)
            starts.append(start)
        return self._requests.make(batch, file, first_id, prompts, starts)

    def _joined(self, context: Prompt, text: Prompt) -> tuple[Prompt, int]:
        if isinstance(context, RowError):
            return context, 0
        if isinstance(text, RowError):
            return text, 0
        context = context[: len(context) - self._behind]  # what ends a text does not stand in the middle of one
        ids, start = context + text, max(len(context), 1)
        if start >= len(ids):
            return RowError(
                EMPTY_INPUT, "task.continuation: no token to score; expected some text; filter such rows"
            ), 0
        if len(ids) > self._limit:
            return too_long("task.prompt with task.continuation", len(ids), self._limit), 0
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
