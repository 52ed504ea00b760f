"""One or several projections of the same input, multiplied as one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engines.ops import OpSet
from engines.ops.moe import Projection
from engines.weights import LinearSource, Weights


class Format(Protocol):
    """What a module of engines/formats offers, besides `detect`; `read_stacked` where experts may share a tensor."""

    def read(self, weights: Weights, source: LinearSource) -> Projection: ...


def select_rows(read: Projection, rows: Tensor) -> Projection:
    weight = read.weight[rows] if isinstance(read.weight, Tensor) else read.weight.rows(rows)
    return Projection(weight, None if read.bias is None else read.bias[rows])


class Linear:
    """x: [num_tokens, in_features] -> [num_tokens, out_features of all parts, end to end].

    rows: [n] int64, the output features that are wanted, in that order; None: all.
    """

    def __init__(
        self, source: LinearSource, weights: Weights, fmt: Format, ops: OpSet, rows: Tensor | None = None
    ) -> None:
        self.ops = ops
        read = fmt.read(weights, source)
        if rows is not None:
            read = select_rows(read, rows)
        if isinstance(read.weight, Tensor):
            self.weight = ops.prepare_linear(read.weight, read.bias)
        else:
            self.weight = ops.prepare_quantized(read.weight, read.bias, weights.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight)
