"""Quantized weights in the order in which the compiled kernels read them (csrc/cuda/linear_w4a16.h)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engines.ops.quantized import GroupedIntWeight

ROWS, COLUMNS = 128, 64
"""Output features are padded to a multiple of ROWS; input features must be one of COLUMNS."""


@dataclass(frozen=True)
class W4Weight:
    """4-bit codes as w4a16_linear takes them."""

    codes: Tensor
    """[padded_out / 16, in_features / 64, 32, 4] int32"""
    groups: Tensor
    """[in_features / group_size, padded_out] int32: scale in the upper half, zero in the lower"""
    scales_are_bf16: bool
    """The scales' 16 bits are bfloat16's; else float16's."""
    permutation: Tensor | None


def pack_w4(weight: GroupedIntWeight) -> W4Weight | None:
    """None for a weight that the kernel does not take: other bits, sizes, or scales that no 16-bit float holds."""
    out_features, in_features = weight.shape
    size = min(weight.group_size, in_features)
    fits = weight.bits == 4 and in_features % COLUMNS == 0 and in_features % size == 0
    if not fits or (size != 32 and size % COLUMNS):
        return None
    kind = next(
        (k for k in (torch.float16, torch.bfloat16) if torch.equal(weight.scales.to(k).float(), weight.scales)), None
    )
    if kind is None:
        return None
    padding = -out_features % ROWS
    codes = torch.nn.functional.pad(weight.codes, (0, 0, 0, padding))
    bits = weight.scales.to(kind).view(torch.int16).int()
    groups = torch.nn.functional.pad(bits << 16 | weight.zeros.int(), (0, 0, 0, padding))
    return W4Weight(_in_lane_order(codes), groups.T.contiguous(), kind == torch.bfloat16, weight.permutation)


def _in_lane_order(codes: Tensor) -> Tensor:
    """codes: [padded_out, in_features] uint8. A word holds what a lane multiplies of 16 rows and 16 columns.

    Row 8 a + g and column 8 b + 2 t + p of such a square are bits 4 (a + 2 b + 4 p) of the word of lane 4 g + t.
    """
    rows, columns = codes.shape
    square = codes.view(rows // 16, 2, 8, columns // COLUMNS, 4, 2, 4, 2)  # tile, a, g, chunk, word, b, t, p
    nibbles = square.permute(0, 3, 2, 6, 4, 7, 5, 1).reshape(rows // 16, columns // COLUMNS, 32, 4, 8).long()
    shifts = torch.arange(8, device=codes.device) * 4
    words = (nibbles << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
