"""Products with weights that are laid out for the processor once, at load."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engines import extension
from engines.ops import OpSet
from engines.ops import linear as reference
from engines.ops.linear import Inputs, LinearWeight
from engines.ops.quantized import GroupedIntWeight, Int8Weight, QuantizedWeight

STRIP, STEP_INPUTS = 16, 32
"""Outputs and inputs of a tile: csrc/cpu/linear.h"""
INT8_ROWS = 256
"""Tokens of one of oneDNN's products of integers: its float32 sums are read again while they are in the cache."""


@dataclass(frozen=True)
class PackedWeight:
    """In tiles for the matrix unit (csrc/cpu/linear.h). Inputs are bfloat16."""

    data: Tensor
    """bfloat16, int8, or uint8: integers of 4 or 8 bits, which become bfloat16 again in every product"""
    scales: Tensor | None = None
    """float32; int8: [out_features]; uint8: [strips, groups, 1 or 2, 16], with zeros if these are not all the same"""
    input_scale: Tensor | None = None
    """[1] float32: one of all inputs; None: each token has its own"""


@dataclass(frozen=True)
class PackedInt8:
    """An Int8Weight as oneDNN has it, for machines without a matrix unit and other inputs than bfloat16."""

    data: Tensor
    scales: Tensor
    """[out_features] float32"""
    zeros: Tensor
    """[out_features] int64: none"""
    input_scale: Tensor | None


@dataclass(frozen=True)
class PanelWeight:
    """Side by side in panels for vectors (csrc/cpu/panels.h): float32, float16 or bfloat16, as the inputs are."""

    data: Tensor


def prepare_linear(self: OpSet, weight: Tensor, bias: Tensor | None) -> LinearWeight:
    """As the reference. With the compiled library weights are packed: bfloat16 for the matrix unit, others for vectors.

    bfloat16 without a matrix unit is oneDNN's, where that has instructions for it: its products are invariant as well.
    torch's own float32 products are not: what a row's bits are depends on how many rows there are. They are a sixth
    faster for long prompts, and taken where that is what is wanted, or nothing was compiled.
    """
    sizes = weight.shape[1], weight.shape[0]
    if not weight.numel() or weight.dtype == torch.float64:
        return reference.prepare_linear(weight, bias)
    compiled, bf16 = extension.reason() is None, weight.dtype == torch.bfloat16
    if bf16 and compiled and _has_matrix_unit():
        return LinearWeight(PackedWeight(torch.ops.cpu_ops.pack_weight(weight.contiguous())), bias, *sizes)
    if bf16 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return LinearWeight(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None), bias, *sizes)
    if compiled and (self.invariant or weight.dtype != torch.float32):
        extension.load()
        return LinearWeight(PanelWeight(torch.ops.cpu_ops.pack_panels(weight.contiguous())), bias, *sizes)
    return reference.prepare_linear(weight, bias)


def prepare_quantized(self: OpSet, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> LinearWeight:
    """As the reference. With the compiled library, 8-bit integers are packed for the integer units (AMX, VNNI), and
    groups of integers stay integers where there is a matrix unit: their products have the bits of the dequantized
    weight's."""
    if isinstance(weight, GroupedIntWeight) and keeps_codes(weight, dtype):
        return LinearWeight(_pack_codes(weight), bias, weight.shape[1], weight.shape[0])
    if not isinstance(weight, Int8Weight) or dtype == torch.float64 or extension.reason() is not None:
        return reference.prepare_quantized(self, weight, bias, dtype)
    scales = weight.scales.float().contiguous()
    data: PackedWeight | PackedInt8
    if dtype == torch.bfloat16 and weight.data.numel() and _has_matrix_unit():
        data = PackedWeight(torch.ops.cpu_ops.pack_weight(weight.data.contiguous()), scales, weight.input_scale)
    else:
        packed = torch.ops.onednn.qlinear_prepack(weight.data, None)
        data = PackedInt8(packed, scales, torch.zeros(len(scales), dtype=torch.int64), weight.input_scale)
    return LinearWeight(data, bias, weight.shape[1], weight.shape[0])


def keeps_codes(weight: GroupedIntWeight, dtype: torch.dtype) -> bool:
    """Whether the weight is multiplied from its codes; else it is dequantized."""
    (rows, columns), size = weight.shape, weight.group_size
    whole = size >= columns or (size % STEP_INPUTS == 0 and columns % size == 0)
    if weight.bits not in (4, 8) or weight.permutation is not None or not (whole and rows and columns):
        return False
    return dtype == torch.bfloat16 and extension.reason() is None and _has_matrix_unit()


def _pack_codes(weight: GroupedIntWeight) -> PackedWeight:
    rows, groups = weight.scales.shape
    zeros = weight.zeros - 2 ** (weight.bits - 1)
    parts = [weight.scales, zeros] if zeros.any() else [weight.scales]
    strips = -(-rows // (2 * STRIP)) * 2
    scales = torch.zeros(strips * STRIP, groups, len(parts))
    for i, part in enumerate(parts):
        scales[:rows, :, i] = part
    scales = scales.unflatten(0, (strips, STRIP)).permute(0, 2, 3, 1).contiguous()
    return PackedWeight(torch.ops.cpu_ops.pack_codes(weight.codes.contiguous(), weight.bits), scales)


def linear(x: Inputs, weight: LinearWeight) -> Tensor:
    """As the reference. A token's bits do not depend on the others, but for float32 that is not packed."""
    data = weight.data
    if isinstance(data, Int8Weight):
        return reference.linear(x, weight)
    assert isinstance(x, Tensor)
    if isinstance(data, PackedWeight):
        return _packed_linear(x, data, weight.bias, weight.out_features)
    if isinstance(data, PanelWeight):
        panels: Tensor = torch.ops.cpu_ops.linear_panels(x, data.data, weight.bias, weight.out_features)
        return panels
    if isinstance(data, PackedInt8):
        return _int8_linear(x, data, weight.bias, weight.out_features)
    if not (isinstance(data, Tensor) and data.is_mkldnn):
        return reference.linear(x, weight)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.out_features)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, data, weight.bias, "none", [], "")
    return result


def _packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out_features: int) -> Tensor:
    scales = None
    if weight.data.dtype == torch.int8:
        x, scales = torch.ops.cpu_ops.quantize_rows(x, weight.input_scale)
    result: Tensor = torch.ops.cpu_ops.linear_packed(x, weight.data, bias, weight.scales, scales, out_features)
    return result


def _int8_linear(x: Tensor, weight: PackedInt8, bias: Tensor | None, out_features: int) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, out_features)
    codes, scales = torch.ops.cpu_ops.quantize_rows(x, weight.input_scale)
    out = x.new_empty(x.shape[0], out_features)
    for rows, scale, part in zip(codes.split(INT8_ROWS), scales.split(INT8_ROWS), out.split(INT8_ROWS), strict=True):
        torch.ops.cpu_ops.rescale_rows(_sums(rows, weight), scale, bias, part)
    return out


def _sums(codes: Tensor, weight: PackedInt8) -> Tensor:
    """Sums of integers, exact, times the weight's scales, in float32."""
    made: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, weight.data, weight.scales, weight.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return made


def _has_matrix_unit() -> bool:
    """Whether the compiled library, which must have been built, multiplies on it."""
    extension.load()
    return bool(torch.ops.cpu_ops.packs_weights())
