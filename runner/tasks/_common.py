"""What the tasks share: prompts to requests with limits, streams and per-row sampling; outcomes to columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import pyarrow as pa
import xxhash

from engines.api import Kind, Outcome, Request, SamplingParams
from runner.chunk import ERROR_COLUMN, ROW_COLUMN
from runner.config import JobConfig
from runner.errors import BAD_SAMPLING, EMPTY_INPUT, TOO_LONG, UNREADABLE_ROW, RowError
from runner.prompt import Template, Tokenizer, values_of
from runner.schema import Key, arguments, keys

Prompt = list[int] | RowError
Result = Sequence[Outcome] | RowError


def unreadable(batch: pa.RecordBatch) -> list[str | None]:
    """Why each row could not be read; None for sound rows."""
    if ERROR_COLUMN not in batch.schema.names:
        return [None] * batch.num_rows
    return batch.column(ERROR_COLUMN).to_pylist()


def stream(seed: int, file: str, row: int, sample: int) -> int:
    """The 64-bit key of a sample's random numbers."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{file}\0{row}\0{sample}".encode())


class Requests:
    """Makes a row's requests out of its prompt."""

    def __init__(self, job: JobConfig, kind: Kind) -> None:
        self.kind = kind
        self.seed = job.seed
        self.samples = job.samples
        self.columns = sorted(set(job.sampling_columns.values()))
        self._overrides = job.sampling_columns
        self._adapter, self._adapter_column = job.model.adapter, job.model.adapter_column
        self._keys = [key for key in keys(SamplingParams) if key.name in self._overrides]
        names = [f.name for f in fields(SamplingParams)]
        self._sampling = SamplingParams(**{name: getattr(job.sampling, name) for name in names})

    def make(
        self, batch: pa.RecordBatch, file: str, first_id: int, prompts: Sequence[Prompt], starts: Sequence[int] = ()
    ) -> list[Sequence[Request] | RowError]:
        """starts: for `score`, where each prompt's continuation begins."""
        rows = batch.column(ROW_COLUMN).to_pylist()
        sampling = self._per_row(batch) if self._overrides else None
        adapters = self._adapters(batch)
        made: list[Sequence[Request] | RowError] = []
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, RowError):
                made.append(prompt)
                continue
            params = sampling[i] if sampling else self._sampling
            if isinstance(params, RowError):
                made.append(params)
                continue
            base = first_id + i * self.samples
            made.append(
                [
                    Request(
                        base + s,
                        self.kind,
                        prompt,
                        params if self.kind == "generate" else None,
                        stream(self.seed, file, rows[i], s) if params.temperature else 0,
                        starts[i] if starts else 0,
                        adapters[i],
                    )
                    for s in range(self.samples)
                ]
            )
        return made

    def _adapters(self, batch: pa.RecordBatch) -> list[str | None]:
        """Of each row; the engine answers a name that is none with an error of the row."""
        if self._adapter_column is None:
            return [self._adapter] * batch.num_rows
        named = values_of(batch.column(self._adapter_column), self._adapter_column)
        return [self._adapter if name is None else str(name) for name in named]

    def _per_row(self, batch: pa.RecordBatch) -> list[SamplingParams | RowError]:
        """Equal ones are one object."""
        names = [self._overrides[key.name] for key in self._keys]
        columns = [values_of(batch.column(name), name) for name in names]
        made: dict[str, SamplingParams | RowError] = {}
        found = []
        for values in zip(*columns, strict=True):
            name = repr(values)  # tells 1 from True, and lists may be in it
            if name not in made:
                made[name] = self._merged(values)
            found.append(made[name])
        return found

    def _merged(self, values: Sequence[Any]) -> SamplingParams | RowError:
        for value in values:
            if isinstance(value, RowError):
                return value
        given = {key.name: _plain(key, v) for key, v in zip(self._keys, values, strict=True) if v is not None}
        findings: list[str] = []
        changed = arguments([key for key in self._keys if key.name in given], given, "sampling", findings)
        if findings:
            return RowError(BAD_SAMPLING, "\n".join(findings))
        merged = replace(self._sampling, **changed)
        if merged.max_tokens is not None and merged.min_tokens > merged.max_tokens:
            return RowError(
                BAD_SAMPLING,
                f"sampling.min_tokens: {merged.min_tokens}; expected at most sampling.max_tokens, which is "
                f"{merged.max_tokens}; correct the row",
            )
        return merged


def _plain(key: Key, value: Any) -> Any:
    """What YAML would have: columns with nulls often hold integers as floats, and one stop text is a list of one."""
    if isinstance(value, float) and value.is_integer() and key.hint not in (float, float | None):
        return int(value)
    return value if isinstance(value, list) or key.name not in ("stop", "stop_token_ids") else [value]


class Input:
    """A template over the columns of a row, and the token ids of what it gives.

    Control tokens that the template itself spells are control tokens; those that data spells are text.
    """

    def __init__(self, text: str, key: str, tokenizer: Tokenizer, add_special: bool = True) -> None:
        self._template = Template(text, key)
        self._tokenizer, self._add_special = tokenizer, add_special
        self._controls = tokenizer.spells_control(text)
        self.columns = self._template.columns

    def encode(self, batch: pa.RecordBatch) -> list[Prompt]:
        if self._controls:
            texts = self._template.render(batch, self._tokenizer.shield)
            return encoded(texts, batch, lambda sound: self._tokenizer.encode_rendered(sound, self._add_special))
        texts = self._template.render(batch)
        return encoded(texts, batch, lambda sound: self._tokenizer.encode(sound, self._add_special))


def encoded(
    texts: Sequence[str | RowError], batch: pa.RecordBatch, encode: Callable[[list[str]], list[list[int]]]
) -> list[Prompt]:
    """Token ids of the texts of sound rows, in one call of `encode`; errors stay in their places."""
    rows: list[str | RowError] = [
        text if why is None else RowError(UNREADABLE_ROW, why)
        for text, why in zip(texts, unreadable(batch), strict=True)
    ]
    ids = iter(encode([row for row in rows if isinstance(row, str)]))
    return [next(ids) if isinstance(row, str) else row for row in rows]


class Limit:
    """What becomes of prompts of more than `most` tokens: an error of the row, or the text is cut on one side.

    The tokens that the tokenizer puts around a text stay. Remembers which requests were cut until that is asked for.
    """

    def __init__(self, most: int, key: str, on_too_long: str = "error", around: tuple[int, int] = (0, 0)) -> None:
        """key: what is too long, for messages. around: tokens at both ends that stay."""
        self._most = max(most, sum(around))
        self._key, self._on_too_long, self._around = key, on_too_long, around
        self._cut: set[int] = set()

    def fit(self, prompt: Prompt, request_id: int) -> Prompt:
        if isinstance(prompt, RowError):
            return prompt
        if not prompt:
            return RowError(EMPTY_INPUT, f"{self._key}: no tokens; expected some text; filter such rows")
        if len(prompt) <= self._most:
            return prompt
        if self._on_too_long == "error":
            return too_long(self._key, len(prompt), self._most)
        self._cut.add(request_id)
        before, behind = self._around
        end = len(prompt) - behind
        excess = len(prompt) - self._most
        if self._on_too_long == "truncate_left":
            return prompt[:before] + prompt[before + excess :]
        return prompt[: end - excess] + prompt[end:]

    def was_cut(self, request_id: int) -> bool:
        """Forgets it, too: each request has one outcome."""
        cut = request_id in self._cut
        self._cut.discard(request_id)
        return cut


ON_TOO_LONG = ("error", "truncate_left", "truncate_right")


def too_long(key: str, found: int, most: int) -> RowError:
    return RowError(
        TOO_LONG, f"{key}: {found} tokens; expected at most {most}, as the model takes; shorten or filter such rows"
    )


Row = Sequence[Outcome] | None
"""The outcomes of a row that succeeded; None for one that did not."""


def good(results: Sequence[Result]) -> list[Row]:
    """Each row's outcomes if all of them are results."""
    return [
        None if isinstance(r, RowError) or (r[0] if len(r) == 1 else _worst(r)).finish_reason == "error" else r
        for r in results
    ]


def _worst(outcomes: Sequence[Outcome]) -> Outcome:
    return next((o for o in outcomes if o.finish_reason == "error"), outcomes[0])


def column(rows: Sequence[Row], kind: pa.DataType, samples: int, value: Callable[[Outcome], Any]) -> pa.Array:
    """One value a row, or a list of `samples` values; null for rows without a result."""
    if samples > 1:
        return pa.array([None if r is None else [value(o) for o in r] for r in rows], pa.list_(kind))
    return pa.array([None if r is None else value(r[0]) for r in rows], kind)
