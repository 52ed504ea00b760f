"""Text that continues a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from engines.api import Kind, Outcome, bounded
from engines.checkpoint import Checkpoint
from runner.config import JobConfig, TaskConfig
from runner.prompt import Tokenizer
from runner.tasks import RowRequests
from runner.tasks._common import ON_TOO_LONG, Input, Limit, Prompt, Requests, Result, Row, column, good

KIND: Kind = "generate"


@dataclass(frozen=True)
class Config(TaskConfig):
    """Text that continues a prompt."""

    prompt: str
    """Jinja template over the columns of a row; `row["any name"]` for columns whose names are no Jinja names."""
    add_special_tokens: bool = True
    """Begin with the tokens that the checkpoint's tokenizer puts before a text (beginning-of-sequence)."""
    on_too_long: str = bounded("error", choices=ON_TOO_LONG)
    """A prompt longer than the context: an error of its row, or cut on that side to make room for
    sampling.max_tokens, with input_truncated set."""


class Generate:
    """Prompts from a function over batches; the chat task gives another one."""

    kind: Kind = KIND

    def __init__(
        self,
        job: JobConfig,
        tokenizer: Tokenizer,
        limit: Limit,
        columns: Sequence[str],
        prompts: Callable[[pa.RecordBatch], list[Prompt]],
    ) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        self._prompts = prompts
        self._requests = Requests(job, KIND)
        self._samples = job.samples
        self._min_tokens = job.sampling.min_tokens
        self._token_ids = job.output.token_ids
        self._logprobs = job.sampling.logprobs is not None or "logprobs" in job.sampling_columns
        self.columns = sorted({*columns, *self._requests.columns})
        self.schema = self._schema()

    def _schema(self) -> pa.Schema:
        def each(kind: pa.DataType) -> pa.DataType:
            return pa.list_(kind) if self._samples > 1 else kind

        columns = [("text", each(pa.string()))]
        if self._token_ids:
            columns.append(("token_ids", each(pa.list_(pa.int32()))))
        columns += [
            ("finish_reason", each(pa.string())),
            ("num_prompt_tokens", pa.int32()),
            ("num_output_tokens", each(pa.int32())),
            ("input_truncated", pa.bool_()),
        ]
        if self._logprobs:
            columns.append(("logprobs", each(LOGPROBS)))
        return pa.schema(columns)

    def requests(self, batch: pa.RecordBatch, file: str, first_id: int) -> list[RowRequests]:
        prompts = [self._limit.fit(p, first_id + i * self._samples) for i, p in enumerate(self._prompts(batch))]
        return self._requests.make(batch, file, first_id, prompts)

    def outputs(self, results: Sequence[Result]) -> pa.RecordBatch:
        rows = good(results)
        texts = self._texts(rows)
        samples = self._samples
        columns = [column(rows, pa.string(), samples, lambda o: texts[o.request_id])]
        if self._token_ids:
            columns.append(column(rows, pa.list_(pa.int32()), samples, lambda o: o.token_ids))
        columns += [
            column(rows, pa.string(), samples, lambda o: o.finish_reason),
            column(rows, pa.int32(), 1, lambda o: o.num_prompt_tokens),
            column(rows, pa.int32(), samples, lambda o: len(o.token_ids)),
            column(rows, pa.bool_(), 1, lambda o: self._limit.was_cut(o.request_id)),
        ]
        if self._logprobs:
            columns.append(column(rows, LOGPROBS, samples, _logprobs))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _texts(self, rows: Sequence[Row]) -> dict[int, str]:
        """By request id: decoded, and cut before the stop string."""
        outcomes = [o for row in rows for o in row or ()]
        texts = self._tokenizer.decode_batch([o.token_ids for o in outcomes])
        return {o.request_id: self._before_stop(text, o) for o, text in zip(outcomes, texts, strict=True)}

    def _before_stop(self, text: str, outcome: Outcome) -> str:
        """The text without the stop string that ended it and what the last token brought behind it."""
        stop = outcome.stop_reason
        if not isinstance(stop, str):
            return text
        # Stop strings within the first min_tokens tokens did not count.
        forced = self._tokenizer.decode(outcome.token_ids[: self._min_tokens]) if self._min_tokens else ""
        at = text.find(stop, max(len(forced) - len(stop), 0))
        return text if at < 0 else text[:at]


LOGPROBS = pa.list_(
    pa.struct(
        [
            ("token_id", pa.int32()),
            ("logprob", pa.float32()),
            ("top_token_ids", pa.list_(pa.int32())),
            ("top_logprobs", pa.list_(pa.float32())),
        ]
    )
)


def _logprobs(outcome: Outcome) -> list[dict[str, object]] | None:
    """Null where a row of `sampling.columns` asked for none."""
    if outcome.logprobs is None:
        return None
    return [
        {"token_id": token, "logprob": t.logprob, "top_token_ids": t.top_ids, "top_logprobs": t.top_logprobs}
        for token, t in zip(outcome.token_ids, outcome.logprobs, strict=False)
    ]


def build(job: JobConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, max_model_len: int) -> Generate:
    config = job.task
    assert isinstance(config, Config)
    prompt = Input(config.prompt, "task.prompt", tokenizer, config.add_special_tokens)
    output = 1
    around = (0, 0)
    if config.on_too_long != "error":  # what is cut anyway makes room for the output, but keeps at least half
        output = max(min(job.sampling.max_tokens or 1, max_model_len // 2), 1)
        around = tokenizer.around if config.add_special_tokens else around
    limit = Limit(max_model_len - output, "task.prompt", config.on_too_long, around)
    return Generate(job, tokenizer, limit, prompt.columns, prompt.encode)
