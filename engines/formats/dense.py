"""Weights as they are trained: no quantization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from engines.ops.moe import Projection
from engines.weights import Cut, LinearSource, Weights


def detect(quantization: dict[str, Any] | None) -> bool:
    """Whether this format is what a checkpoint's quantization_config describes."""
    return quantization is None


def read(weights: Weights, source: LinearSource) -> Projection:
    """The projections of a source, one below the other."""
    weight = weights.stack(source, "weight")
    return Projection(weight, weights.stack(source, "bias") if source.bias and source.has_bias else None)


def read_stacked(weights: Weights, name: str, experts: Cut, rows: Cut, columns: Cut) -> list[Projection]:
    """One projection of every held expert, from tensors that hold them all: [num_experts, in_features, out_features].

    As engines.weights.LinearSource.columns has it, the bias is with the first of the input features.
    """
    shape = (len(experts), len(columns), len(rows))
    here = (experts.by(), columns.by(), rows.by())
    stacked = weights.read(weights.stored_name(name), shape, weights.dtype, *here)
    biases = read_biases(weights, name, experts, rows, columns)
    return [Projection(weight.T, bias) for weight, bias in zip(stacked, biases, strict=True)]


def read_biases(weights: Weights, name: str, experts: Cut, rows: Cut, columns: Cut) -> Sequence[Tensor | None]:
    """[out_features] of each held expert; None where another rank has them."""
    if columns.held[0].start:
        return [None] * len(experts)
    shape = (len(experts), len(rows))
    return weights.read(weights.stored_name(f"{name}_bias"), shape, weights.dtype, experts.by(), rows.by()).unbind()
