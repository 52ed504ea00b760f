"""Weights as they are trained: no quantization."""

from __future__ import annotations

from typing import Any

from engines.ops.moe import Projection
from engines.weights import LinearSource, Weights


def detect(quantization: dict[str, Any] | None) -> bool:
    """Whether this format is what a checkpoint's quantization_config describes."""
    return quantization is None


def read(weights: Weights, source: LinearSource) -> Projection:
    """The projections of a source, one below the other."""
    weight = weights.stack(source, "weight", source.in_features)
    return Projection(weight, weights.stack(source, "bias") if source.bias else None)


def read_stacked(
    weights: Weights, name: str, num_experts: int, out_features: int, in_features: int
) -> list[Projection]:
    """One projection of every expert, from tensors that hold them all: [num_experts, in_features, out_features]."""
    stacked = weights.take(name, num_experts, in_features, out_features)
    biases = weights.take(f"{name}_bias", num_experts, out_features)
    return [Projection(weight.T, bias) for weight, bias in zip(stacked, biases, strict=True)]
