"""Weights as the compiled kernels read them (csrc/cuda/product.h, linear_fp8.h)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engines.ops.quantized import Float8Weight, GroupedIntWeight, Int8Weight, MXFP4Weight, QuantizedWeight

ROWS, CHUNK_BYTES = 128, 128
"""Output features are padded to a multiple of ROWS, input features to whole chunks: 64 values of 16 bits, 128 of 8."""
COLUMNS = CHUNK_BYTES // 2


@dataclass(frozen=True)
class Fp8Weight:
    """8-bit floats as linear_fp8 takes them: as they were stored."""

    codes: Tensor
    """[out_features, in_features] uint8"""
    scales: Tensor
    """[ceil(out_features / 128), in_features / 128] or [out_features] float32"""
    input_scale: Tensor | None

    @property
    def rounding(self) -> str:
        """What inputs are rounded to, as the op quantize names it: by token, or by token and 128 columns."""
        return "e4m3 128" if self.scales.dim() == 2 else "e4m3"


@dataclass(frozen=True)
class PackedWeight:
    """A weight, or those of several experts, as the ops linear and expert_linear take them."""

    format: str
    """w4 float16, w4 bfloat16 (by the dtype of its scales), fp8, mxfp4, int8, dense."""
    codes: Tensor
    """[experts, padded_out / 16, chunks, pieces, 32, 4] int32; pieces: 1 for 4-bit codes, 2 of fp8, else 4"""
    scales: Tensor | None
    """[experts, rows, padded_out]: int32 of w4, scale in the upper half, zero in the lower; uint8 of mxfp4; float32 of
    fp8 and int8; None: dense."""
    permutation: Tensor | None = None
    """[in_features] int64: the input that column j multiplies."""
    input_scale: Tensor | None = None
    """Of int8; None: each token's own."""

    @property
    def rounding(self) -> str | None:
        """As Fp8Weight has it; None: inputs are taken as they are."""
        return "int8" if self.format == "int8" else None


def pack(weight: QuantizedWeight) -> PackedWeight | None:
    """None for a weight that no kernel takes: other bits, sizes, or scales that no 16-bit float holds."""
    if isinstance(weight, GroupedIntWeight):
        return _pack_w4(weight)
    if isinstance(weight, Float8Weight):
        return _pack_float8(weight)
    if isinstance(weight, MXFP4Weight):
        return _pack_mxfp4(weight)
    if isinstance(weight, Int8Weight) and weight.shape[1] % 8 == 0:
        scales = functional.pad(weight.scales.float(), (0, -weight.shape[0] % ROWS))
        return PackedWeight("int8", in_lane_order(weight.data)[None], scales[None, None], None, weight.input_scale)
    return None


def pack_fp8(weight: Float8Weight) -> Fp8Weight | None:
    """None for other tiles than of 128 x 128 or of a row, and for sizes that are not copied in whole stages."""
    columns = weight.shape[1]
    if columns % 128 or weight.tile not in ((128, 128), (1, columns)):
        return None
    scales = weight.scales if weight.tile[0] == 128 else weight.scales[:, 0]
    return Fp8Weight(weight.data.view(torch.uint8).contiguous(), scales.float().contiguous(), weight.input_scale)


def in_lane_order(weight: Tensor) -> Tensor:
    """weight: [out_features, in_features] of 16 or 8 bits. Returns [padded_out / 16, chunks, 4, 32, 4] int32.

    Word a + 2 b of lane 4 g + t holds bytes 16 b + 4 t and the following three of row 8 a + g, of 16 rows and 32 bytes.
    """
    bytes_of = weight.contiguous().view(torch.uint8)
    bytes_of = functional.pad(bytes_of, (0, -bytes_of.shape[1] % CHUNK_BYTES, 0, -len(bytes_of) % ROWS))
    rows, columns = bytes_of.shape
    square = bytes_of.view(rows // 16, 2, 8, columns // 32, 2, 4, 4)  # tile, a, g, quarter of a chunk, b, t, byte
    words = square.permute(0, 3, 2, 5, 4, 1, 6).contiguous().view(torch.int32)
    return words.view(rows // 16, columns // CHUNK_BYTES, 4, 32, 4)


def _pack_w4(weight: GroupedIntWeight) -> PackedWeight | None:
    out_features, in_features = weight.shape
    size = min(weight.group_size, in_features)
    fits = weight.bits == 4 and in_features % COLUMNS == 0 and in_features % size == 0
    if not fits or (size != 32 and size % COLUMNS):
        return None
    halves = (torch.float16, torch.bfloat16)
    kind = next((k for k in halves if torch.equal(weight.scales.to(k).float(), weight.scales)), None)
    if kind is None:
        return None
    bits = weight.scales.to(kind).view(torch.int16).int()
    groups = functional.pad(bits << 16 | weight.zeros.int(), (0, 0, 0, -out_features % ROWS))
    name = f"w4 {str(kind).removeprefix('torch.')}"
    return PackedWeight(name, _nibbles(weight.codes), groups.T.contiguous()[None], weight.permutation)


def _pack_float8(weight: Float8Weight) -> PackedWeight | None:
    rows, columns = weight.shape
    one = weight.tile[1] >= columns
    if columns % 8 or not (one or (columns % weight.tile[1] == 0 and weight.tile[1] % COLUMNS == 0)):
        return None
    codes = functional.pad(weight.data.view(torch.uint8), (0, -columns % COLUMNS, 0, -rows % ROWS))
    chunks = codes.shape[1] // COLUMNS
    square = codes.view(-1, 2, 8, chunks, 2, 2, 2, 4, 2)  # tile, a, g, chunk, piece, quarter, b, t, p
    words = square.permute(0, 3, 4, 2, 7, 5, 6, 8, 1).contiguous().view(1, -1, chunks, 2, 32, 16).view(torch.int32)
    scales = functional.pad(weight.by_row().scales.float(), (0, 0, 0, -rows % ROWS))
    return PackedWeight("fp8", words, scales.T.contiguous()[None])


def _pack_mxfp4(weight: MXFP4Weight) -> PackedWeight:
    codes = torch.stack((weight.codes & 15, weight.codes >> 4), -1).flatten(1)
    odd = weight.exponents.shape[1] % 2  # a chunk has two groups
    exponents = functional.pad(weight.exponents, (0, odd, 0, -len(codes) % ROWS))
    return PackedWeight("mxfp4", _nibbles(codes), exponents.T.contiguous()[None])


def _nibbles(codes: Tensor) -> Tensor:
    """codes: [out_features, in_features] uint8. Returns [1, padded_out / 16, chunks, 1, 32, 4] int32.

    Row 8 a + g and column 8 b + 2 t + p of 16 rows and 16 columns are bits 4 (a + 2 b + 4 p) of a word of lane 4 g + t.
    """
    codes = functional.pad(codes, (0, -codes.shape[1] % COLUMNS, 0, -len(codes) % ROWS))
    rows, columns = codes.shape
    square = codes.view(rows // 16, 2, 8, columns // COLUMNS, 4, 2, 4, 2)  # tile, a, g, chunk, word, b, t, p
    pairs = square.permute(0, 3, 2, 6, 4, 7, 5, 1).reshape(1, rows // 16, columns // COLUMNS, 1, 32, 4, 4, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(torch.int32).squeeze(-1)
