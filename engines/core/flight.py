"""A step between its launch and the moment when the host reads what came of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engines.api import TokenLogprobs
from engines.core.device import Download
from engines.core.sampler import Draw
from engines.core.scheduler import Scheduled


@dataclass
class Flight:
    """Filled by the engine as it launches the step."""

    step: list[Scheduled]
    drawing: list[int]
    """Places in `step` of the sequences that a token is drawn for, in the order of the draw's rows."""
    draw: Draw | None = None
    pooled: dict[int, Tensor | None] = field(default_factory=dict)
    """By seq_id: what Sequence.pooled is after the step."""
    download: Download = field(default_factory=lambda: Download([]))
    _values: list[Tensor] = field(default_factory=list)
    _owners: list[tuple[int, int]] = field(default_factory=list)

    def add_values(self, s: Scheduled, values: list[Tensor]) -> None:
        """Numbers of a sequence's result, [n] each."""
        self._values += values
        self._owners.append((s.seq.seq_id, sum(map(len, values))))

    def tensors(self) -> list[Tensor]:
        """All that the host is to read."""
        drawn = [] if self.draw is None else self.draw.tensors()
        return [*drawn, torch.cat(self._values)] if self._values else drawn

    def read(self) -> tuple[dict[int, tuple[int | None, TokenLogprobs | None]], dict[int, list[float]]]:
        """(token and log-probabilities by place in `step`, numbers of results by seq_id); waits for the device."""
        host = self.download.wait()
        values: dict[int, list[float]] = {}
        if self._values:
            numbers = host.pop().tolist()
            ends = itertools.accumulate((count for _, count in self._owners), initial=0)
            values = {seq_id: numbers[at : at + n] for at, (seq_id, n) in zip(ends, self._owners, strict=False)}
        if self.draw is None:
            return {}, values
        return dict(zip(self.drawing, self.draw.read(host), strict=True)), values
