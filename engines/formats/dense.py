"""Weights as they are trained: no quantization."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from engines.ops import OpSet
from engines.ops.linear import LinearWeight
from engines.weights import LinearSource, Weights


def detect(quantization: dict[str, Any] | None) -> bool:
    """Whether this format is what a checkpoint's quantization_config describes."""
    return quantization is None


def load(weights: Weights, source: LinearSource, ops: OpSet) -> LinearWeight:
    """The projections of a source, merged and prepared for the op set. The tensors that were read are freed."""
    weight = weights.stack(source, "weight", source.in_features)
    bias = weights.stack(source, "bias") if source.bias else None
    return ops.prepare_linear(weight, bias)


def linear(ops: OpSet, x: Tensor, weight: LinearWeight) -> Tensor:
    """x: [num_tokens, in_features]; returns [num_tokens, sum of out_features]."""
    return ops.linear(x, weight)
