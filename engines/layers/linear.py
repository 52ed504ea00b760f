"""One or several projections of the same input, multiplied as one."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from engines.ops import OpSet
from engines.weights import LinearSource, Weights


class Format(Protocol):
    """What a module of engines/formats offers."""

    def load(self, weights: Weights, source: LinearSource, ops: OpSet) -> Any: ...

    def linear(self, ops: OpSet, x: Tensor, weight: Any) -> Tensor: ...


class Linear:
    """x: [num_tokens, in_features] -> [num_tokens, out_features of all parts, end to end]."""

    def __init__(self, source: LinearSource, weights: Weights, fmt: Format, ops: OpSet) -> None:
        self.ops = ops
        self.format = fmt
        self.weight = fmt.load(weights, source, ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.format.linear(self.ops, x, self.weight)
