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
        seq = step.seq
        begin, end = seq.num_computed_tokens, seq.num_computed_tokens + step.num_new_tokens
        kind = seq.request.kind
        if kind == "score":
            return range(max(begin, seq.request.score_from - 1), min(end, seq.num_prompt_tokens - 1))
        if kind == "embed" and self.pooling in ("mean", "max"):
            return range(begin, end)
        first = (kind == "embed" and self.pooling == "cls") or (kind == "classify" and self.is_encoder)
        if first:
            return range(1) if begin == 0 else range(0)
        return range(end - 1, end) if step.completes else range(0)

    def part(self, seq: Sequence, positions: range, hidden: Tensor) -> list[float] | Tensor | None:
        """What these positions add to the request's result; nothing is changed.

        hidden: [len(positions), hidden_size], of this step.
        """
        if not len(positions):
            return None
        if seq.request.kind == "score":
            targets = torch.tensor(seq.token_ids[positions.start + 1 : positions.stop + 1], device=hidden.device)
            values: list[float] = []
            for i in range(0, len(positions), SCORE_ROWS):
                logits = self.model.logits(hidden[i : i + SCORE_ROWS])
                values += self.ops.log_softmax_gather(logits, targets[i : i + SCORE_ROWS]).tolist()
            return values
        if self.pooling == "mean" and seq.request.kind == "embed":
            return hidden.float().sum(0)
        if self.pooling == "max" and seq.request.kind == "embed":
            return hidden.float().amax(0)
        return hidden[-1]

    def add(self, seq: Sequence, part: list[float] | Tensor | None) -> None:
        """Keep what `part` gave."""
        if part is None:
            return
        if isinstance(part, list):
            seq.values += part
        elif seq.pooled is None or seq.request.kind != "embed" or self.pooling not in ("mean", "max"):
            seq.pooled = part
        else:
            seq.pooled = seq.pooled + part if self.pooling == "mean" else torch.maximum(seq.pooled, part)

    def result(self, seq: Sequence) -> list[float]:
        """The finished request's values: see engines.api.Outcome.values."""
        if seq.request.kind == "score":
            return seq.values
        assert seq.pooled is not None
        if seq.request.kind == "classify":
            return self.model.classify(seq.pooled[None])[0].tolist()
        vector = seq.pooled.float()
        if self.pooling == "mean":
            vector = vector / seq.num_prompt_tokens
        if self.normalize:
            vector = torch.nn.functional.normalize(vector, dim=0)
        return vector.tolist()
