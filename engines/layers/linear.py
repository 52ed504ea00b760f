"""One or several projections of the same input, multiplied as one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engines.ops import OpSet
from engines.ops.moe import Projection
from engines.weights import LinearSource, Weights


class Format(Protocol):
    """What a module of engines/formats offers, besides `detect`."""

    def read(self, weights: Weights, source: LinearSource) -> Projection: ...

    def read_stacked(
        self, weights: Weights, name: str, num_experts: int, out_features: int, in_features: int
    ) -> list[Projection]: ...


class Linear:
    """x: [num_tokens, in_features] -> [num_tokens, out_features of all parts, end to end]."""

    def __init__(self, source: LinearSource, weights: Weights, fmt: Format, ops: OpSet) -> None:
        self.ops = ops
        read = fmt.read(weights, source)
        if isinstance(read.weight, Tensor):
            self.weight = ops.prepare_linear(read.weight, read.bias)
        else:
            self.weight = ops.prepare_quantized(read.weight, read.bias, weights.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight)
