"""Plain weights that are quantized while they are loaded: 8-bit integers with a scale for each output feature.

Inputs of products stay as they are: weights are GroupedIntWeight, a group as long as a row. Asked for by
model.quantization=w8a16.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from engines.formats._at_load import detect, integers, read_quantized, read_stacked_quantized
from engines.ops.quantized import GroupedIntWeight

__all__ = ["detect", "quantize", "read", "read_stacked"]


def quantize(weight: Tensor) -> GroupedIntWeight:
    """weight: [out_features, in_features]; rounded as integers has it, so that codes are 1 to 255 and zeros 128."""
    signed, scales = integers(weight)
    codes = signed.view(torch.uint8).bitwise_xor_(128)  # two's complement plus 128
    zeros = torch.full_like(scales, 128, dtype=torch.int16)
    return GroupedIntWeight(codes, scales[:, None], zeros[:, None], 8, weight.shape[1])


read = partial(read_quantized, quantize)
read_stacked = partial(read_stacked_quantized, quantize)
