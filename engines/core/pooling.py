"""Results other than text: log-probabilities of given tokens, vectors, labels. From hidden states, chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.core.scheduler import Scheduled
from engines.core.sequence import Sequence
from engines.models.base import Model
from engines.models.spec import EncoderSpec
from engines.ops import OpSet

SCORE_ROWS = 256
"""Logit rows computed at once when scoring: bounds memory at SCORE_ROWS * vocab_size floats."""


class Pooler:
    """Which hidden states a request needs, and what becomes of them."""

    def __init__(self, model: Model, ops: OpSet, pooling: str | None, normalize: bool) -> None:
        self.model = model
        self.ops = ops
        self.is_encoder = isinstance(model.spec, EncoderSpec)
        self.pooling = pooling or ("mean" if self.is_encoder else "last")
        self.normalize = normalize

    def reusable_tokens(self, seq_kind: str, num_tokens: int, score_from: int) -> int:
        """Leading tokens whose hidden states are not needed."""
        if seq_kind == "score":
            return score_from - 1
        if seq_kind == "embed" and self.pooling != "last":
            return 0
        return num_tokens - 1

    def wanted(self, step: Scheduled) -> range:
        """Positions of the step's tokens whose hidden states are needed."""
        kind, begin, end = step.seq.request.kind, step.start, step.end
        if kind == "score":
            return range(max(begin, step.seq.request.score_from - 1), min(end, step.seq.num_prompt_tokens - 1))
        if kind == "embed" and self.pooling in ("mean", "max"):
            return range(begin, end)
        first = (kind == "embed" and self.pooling == "cls") or (kind == "classify" and self.is_encoder)
        if first:
            return range(1) if begin == 0 else range(0)
        return range(end - 1, end) if step.completes else range(0)

    def log_probabilities(self, seq: Sequence, positions: range, hidden: Tensor, targets: Tensor) -> list[Tensor]:
        """`score`: those of the tokens after the positions, in pieces. hidden: [len(positions), hidden_size]; targets:
        [len(positions)] int64, these tokens."""
        return [
            self.ops.log_softmax_gather(self.model.logits(hidden[i : i + SCORE_ROWS]), targets[i : i + SCORE_ROWS])
            for i in range(0, len(positions), SCORE_ROWS)
        ]

    def pooled(self, seq: Sequence, hidden: Tensor) -> Tensor | None:
        """What seq.pooled becomes with these hidden states of its next tokens, [n, hidden_size]; nothing is changed."""
        if not len(hidden):
            return seq.pooled
        if seq.request.kind != "embed" or self.pooling not in ("mean", "max"):
            return hidden[-1]
        part = hidden.float().sum(0) if self.pooling == "mean" else hidden.float().amax(0)
        if seq.pooled is None:
            return part
        return seq.pooled + part if self.pooling == "mean" else torch.maximum(seq.pooled, part)

    def result(self, seq: Sequence, pooled: Tensor) -> Tensor:
        """The values of a sequence that is computed, [num_values] float32: see engines.api.Outcome.values."""
        if seq.request.kind == "classify":
            return self.model.classify(pooled[None])[0]
        vector = pooled.float()
        if self.pooling == "mean":
            vector = vector / seq.num_prompt_tokens
        return torch.nn.functional.normalize(vector, dim=0) if self.normalize else vector
