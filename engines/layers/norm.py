"""Norms with their weights."""

from __future__ import annotations

from torch import Tensor

from engines.ops import OpSet
from engines.ops.block import NormWeight
from engines.ops.linear import Inputs, LinearWeight
from engines.weights import Weights


class RMSNorm:
    """Root-mean-square norm over the last dimension, alone or after the residual's sum."""

    def __init__(self, name: str, size: int, eps: float, offset: float, weights: Weights, ops: OpSet) -> None:
        self.ops = ops
        self.eps = eps
        self.offset = offset
        self.weight = weights.take(f"{name}.weight", size)

    def of_block(self) -> NormWeight:
        return NormWeight(self.weight, None, self.eps, self.offset)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps, self.offset)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum). Neither argument may be used afterwards."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps, self.offset)

    def add_for(self, x: Tensor, residual: Tensor, product: LinearWeight | None) -> tuple[Inputs, Tensor]:
        """The same, for a norm that nothing but `product` takes; None: others do, too."""
        if product is None:
            return self.add(x, residual)
        return self.ops.add_rms_norm_for(x, residual, self.weight, self.eps, self.offset, product)


class LayerNorm:
    """Layer norm over the last dimension."""

    def __init__(self, name: str, size: int, eps: float, weights: Weights, ops: OpSet) -> None:
        self.ops = ops
        self.eps = eps
        self.weight = weights.take(f"{name}.weight", size)
        self.bias = weights.take(f"{name}.bias", size)

    def of_block(self) -> NormWeight:
        return NormWeight(self.weight, self.bias, self.eps)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The norm of x, or of its sum with the residual."""
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps, residual)
