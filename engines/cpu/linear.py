"""Products with weights that oneDNN has laid out for the processor once, at load."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engines import extension
from engines.ops import OpSet
from engines.ops import linear as reference
from engines.ops.linear import LinearWeight
from engines.ops.quantized import Int8Weight, QuantizedWeight

INT8_ROWS = 256
"""Tokens of one product of integers: its float32 sums are read again while they are in the cache."""


@dataclass(frozen=True)
class PackedInt8:
    """An Int8Weight as oneDNN has it."""

    data: Tensor
    scales: Tensor
    """[out_features] float32"""
    zeros: Tensor
    """[out_features] int64: none"""
    input_scale: Tensor | None


def prepare_linear(weight: Tensor, bias: Tensor | None) -> LinearWeight:
    """As the reference. bfloat16 weights are packed for the matrix units (AMX, AVX512-BF16) where there are any.

    Packed products have the same bits as unpacked ones and take a half to nine tenths of the time. float32 and float16
    stay as they are: packing them gains nothing that can be told from noise.
    """
    if not _packs(weight):
        return reference.prepare_linear(weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return LinearWeight(packed, bias, weight.shape[1], weight.shape[0])


def prepare_quantized(self: OpSet, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> LinearWeight:
    """As the reference. With the compiled library, 8-bit integers are packed for the integer units (AMX, VNNI)."""
    if not isinstance(weight, Int8Weight) or dtype == torch.float64 or extension.reason() is not None:
        return reference.prepare_quantized(self, weight, bias, dtype)
    packed = torch.ops.onednn.qlinear_prepack(weight.data, None)
    scales = weight.scales.float().contiguous()
    data = PackedInt8(packed, scales, torch.zeros(len(scales), dtype=torch.int64), weight.input_scale)
    return LinearWeight(data, bias, weight.shape[1], weight.shape[0])


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """As the reference, but that sums of integers for bfloat16 are rounded before and after the token's scale."""
    if isinstance(weight.data, PackedInt8):
        return _int8_linear(x, weight.data, weight.bias, weight.out_features)
    if not (isinstance(weight.data, Tensor) and weight.data.is_mkldnn):
        return reference.linear(x, weight)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.out_features)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.data, weight.bias, "none", [], "")
    return result


def _int8_linear(x: Tensor, weight: PackedInt8, bias: Tensor | None, out_features: int) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, out_features)
    codes, scales = torch.ops.cpu_ops.quantize_rows(x, weight.input_scale)
    if x.dtype == torch.bfloat16 and bias is None:
        # Rounded here, and once more with the token's scale: less than the inputs were, and half the bytes.
        out = _sums(codes, weight, torch.bfloat16)
        torch.ops.cpu_ops.rescale_rows(out, scales, None, out)
        return out
    out = x.new_empty(x.shape[0], out_features)
    for rows, scale, part in zip(codes.split(INT8_ROWS), scales.split(INT8_ROWS), out.split(INT8_ROWS), strict=True):
        torch.ops.cpu_ops.rescale_rows(_sums(rows, weight, torch.float32), scale, bias, part)
    return out


def _sums(codes: Tensor, weight: PackedInt8, dtype: torch.dtype) -> Tensor:
    """Sums of integers, exact, times the weight's scales, rounded to dtype."""
    made: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, weight.data, weight.scales, weight.zeros, None, 1.0, 0, dtype, "none", [], ""
    )
    return made


def _packs(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and weight.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
