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
from runner.errors import RowError
from runner.schema import out_of_bounds

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
        names = [f.name for f in fields(SamplingParams)]
        self._sampling = SamplingParams(**{name: getattr(job.sampling, name) for name in names})

    def make(
        self, batch: pa.RecordBatch, file: str, first_id: int, prompts: Sequence[Prompt], starts: Sequence[int] = ()
    ) -> list[Sequence[Request] | RowError]:
        """starts: for `score`, where each prompt's continuation begins."""
        rows = batch.column(ROW_COLUMN).to_pylist()
        sampling = self._per_row(batch) if self._overrides else None
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
                    )
                    for s in range(self.samples)
                ]
            )
        return made

    def _per_row(self, batch: pa.RecordBatch) -> list[SamplingParams | RowError]:
        columns = {name: batch.column(column).to_pylist() for name, column in self._overrides.items()}
        return [self._merged({k: v[i] for k, v in columns.items() if v[i] is not None}) for i in range(batch.num_rows)]

    def _merged(self, values: dict[str, Any]) -> SamplingParams | RowError:
        if not values:
            return self._sampling
        for name, value in values.items():
            default = getattr(self._sampling, name)
            if name in ("stop", "stop_token_ids"):
                values[name] = tuple(value) if isinstance(value, list) else (value,)
            elif isinstance(default, float) and isinstance(value, int):
                values[name] = float(value)
            elif default is not None and not isinstance(value, type(default)):
                return RowError("bad_sampling", f"{self._overrides[name]}: {value!r} is no {type(default).__name__}")
        merged = replace(self._sampling, **values)
        wrong = out_of_bounds(merged, "sampling")
        return RowError("bad_sampling", "; ".join(wrong)) if wrong else merged


def fit(ids: list[int], limit: int, on_too_long: str) -> tuple[Prompt, bool]:
    """(prompt within the limit, whether it was cut)"""
    if len(ids) <= limit:
        return ids, False
    if on_too_long == "error":
        return RowError("too_long", f"the prompt has {len(ids)} tokens; the model takes at most {limit}"), False
    return (ids[-limit:] if on_too_long == "truncate_left" else ids[:limit]), True


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
