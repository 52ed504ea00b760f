"""One or several projections of the same input, multiplied as one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engines.ops import OpSet
from engines.ops.linear import Inputs, LinearWeight
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

    rows: [n] int64, the output features that are wanted, in that order; None: all. adapts: whether adapters of the job
    apply here; `forward` is then given the tokens' adapters.
    """

    def __init__(
        self,
        source: LinearSource,
        weights: Weights,
        fmt: Format,
        ops: OpSet,
        rows: Tensor | None = None,
        adapts: bool = False,
    ) -> None:
        self.ops = ops
        read = fmt.read(weights, source)
        if rows is not None:
            read = select_rows(read, rows)
        if isinstance(read.weight, Tensor):
            self.weight = ops.prepare_linear(read.weight, read.bias)
        else:
            self.weight = ops.prepare_quantized(read.weight, read.bias, weights.dtype)

        self.adapters = weights.read_adapters(source) if adapts else None
        if self.adapters is not None and rows is not None:
            self.adapters = self.adapters[0], self.adapters[1][:, rows]

    def adapted(self, adapter_ids: Tensor | None) -> bool:
        """Whether adapters change the result for tokens with these adapters."""
        return self.adapters is not None and adapter_ids is not None

    @property
    def takes(self) -> LinearWeight | None:
        """What this product's inputs may be made for; None where adapters multiply them too, as they are."""
        return self.weight if self.adapters is None else None

    def forward(self, x: Inputs, adapter_ids: Tensor | None = None) -> Tensor:
        """adapter_ids: as Batch has them, for the tokens in x."""
        y = self.ops.linear(x, self.weight)
        if self.adapters is not None and adapter_ids is not None:
            assert isinstance(x, Tensor)
            self.ops.lora(y, x, *self.adapters, adapter_ids)
        return y
