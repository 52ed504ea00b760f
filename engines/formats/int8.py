"""Plain weights that are quantized while they are loaded: 8-bit integers with a scale for each output feature.

Products are with 8-bit inputs, each token by its own largest magnitude (engines/ops/quantized.py: Int8Weight). Asked
for by model.quantization=int8.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from engines.formats._at_load import integers, read_quantized, read_stacked_quantized
from engines.ops.moe import Projection
from engines.ops.quantized import Int8Weight
from engines.weights import Cut, LinearSource, Weights


def detect(quantization: dict[str, Any] | None) -> bool:
    return False


def read(weights: Weights, source: LinearSource) -> Projection:
    """As engines.layers.linear.Format."""
    return read_quantized(weights, source, quantize)


def read_stacked(weights: Weights, name: str, experts: Cut, rows: Cut, columns: Cut) -> list[Projection]:
    """As dense.read_stacked."""
    return read_stacked_quantized(weights, name, experts, rows, columns, quantize)


def quantize(weight: Tensor) -> Int8Weight:
    """weight: [out_features, in_features]; rounded as integers has it."""
    return Int8Weight(*integers(weight))
