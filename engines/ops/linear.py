"""Matrix products with weights that are prepared once at load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class LinearWeight:
    """A dense weight in whatever form the op set multiplies fastest. Only op sets look inside."""

    data: Any
    bias: Tensor | None
    in_features: int
    out_features: int


def prepare_linear(weight: Tensor, bias: Tensor | None) -> LinearWeight:
    """weight: [out_features, in_features]; bias: [out_features] or None. The weight may be dropped afterwards."""
    return LinearWeight(weight, bias, weight.shape[1], weight.shape[0])


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """x @ weight.T + bias. x: [num_tokens, in_features]; returns [num_tokens, out_features], x's dtype."""
    return functional.linear(x, weight.data, weight.bias)
