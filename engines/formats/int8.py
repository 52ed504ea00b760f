"""Plain weights that are quantized while they are loaded: 8-bit integers with a scale for each output feature.

Products are with 8-bit inputs, each token by its own largest magnitude (engines/ops/quantized.py: Int8Weight). Asked
for by model.quantization=int8.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from engines.formats._at_load import detect, integers, read_quantized, read_stacked_quantized
from engines.ops.quantized import Int8Weight

__all__ = ["detect", "quantize", "read", "read_stacked"]


def quantize(weight: Tensor) -> Int8Weight:
    """weight: [out_features, in_features]; rounded as integers has it."""
    return Int8Weight(*integers(weight))


read = partial(read_quantized, quantize)
read_stacked = partial(read_stacked_quantized, quantize)
