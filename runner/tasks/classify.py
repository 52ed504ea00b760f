"""A label for a text, with the classification head of the checkpoint and the label names of its config.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from engines.api import Kind, Outcome, bounded
from engines.checkpoint import Checkpoint
from runner.config import JobConfig, TaskConfig
from runner.errors import ConfigError, InputError
from runner.prompt import Tokenizer
from runner.tasks._common import ON_TOO_LONG, Input, Limit, Result, column, good
from runner.tasks.embed import COUNTS, TextTask

KIND: Kind = "classify"


@dataclass(frozen=True)
class Config(TaskConfig):
    """A label for a text, with the classification head of the checkpoint and the label names of its config.json."""

    text: str
    """Jinja template over the columns of a row."""
    on_too_long: str = bounded("truncate_right", choices=ON_TOO_LONG)
    """A text longer than the model takes: an error of its row, or cut on that side, with input_truncated set."""


class Classify(TextTask):
    """Labels that exclude each other have probabilities that add up to 1 (softmax); each of the others, and a model's
    only label, has one of its own (sigmoid)."""

    def __init__(self, job: JobConfig, text: Input, limit: Limit, labels: Sequence[str], several: bool) -> None:
        """several: labels do not exclude each other."""
        super().__init__(job, text, limit, KIND)
        self._labels = labels
        self._several = several
        self._probabilities = pa.struct([(label, pa.float32()) for label in labels])
        self.schema = pa.schema(
            [("label", pa.string()), ("probability", pa.float32()), ("probabilities", self._probabilities), *COUNTS]
        )

    def outputs(self, results: Sequence[Result]) -> pa.RecordBatch:
        def best(outcome: Outcome) -> int:
            values = list(outcome.values or ())
            return values.index(max(values))

        rows = good(results)
        columns = [
            column(rows, pa.string(), 1, lambda o: self._labels[best(o)]),
            column(rows, pa.float32(), 1, lambda o: self._shares(o)[best(o)]),
            column(rows, self._probabilities, 1, lambda o: dict(zip(self._labels, self._shares(o), strict=True))),
        ]
        return pa.RecordBatch.from_arrays([*columns, *self.counts(rows)], schema=self.schema)

    def _shares(self, outcome: Outcome) -> list[float]:
        values = list(outcome.values or ())
        if self._several:
            return [1 / (1 + math.exp(-max(min(v, 700.0), -700.0))) for v in values]
        top = max(values)
        powers = [math.exp(v - top) for v in values]
        return [p / sum(powers) for p in powers]


def build(job: JobConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, max_model_len: int) -> Classify:
    config = job.task
    assert isinstance(config, Config)
    labels = _labels(checkpoint)
    problem = checkpoint.config.get("problem_type")
    if problem == "regression":
        raise ConfigError(
            f"task classify: {checkpoint.path} is a regression model, whose outputs are no labels; expected a "
            "classifier; choose another model"
        )
    limit = Limit(max_model_len, "task.text", config.on_too_long, tokenizer.around)
    several = problem == "multi_label_classification" or len(labels) == 1
    return Classify(job, Input(config.text, "task.text", tokenizer), limit, labels, several)


def _labels(checkpoint: Checkpoint) -> list[str]:
    """Names of the model's labels in order; LABEL_0, LABEL_1 ... where config.json has none, as in transformers."""
    names = checkpoint.config.get("id2label") or {}
    count = len(names) or int(checkpoint.config.get("num_labels") or 2)
    labels = [str(names.get(str(i), f"LABEL_{i}")) for i in range(count)]
    if len({*labels}) != count:
        raise InputError(
            f"{checkpoint.path}/config.json: id2label has a name twice; expected {count} different ones; correct it"
        )
    return labels
