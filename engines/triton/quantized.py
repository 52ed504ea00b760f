"""Quantized weights in the order in which the kernels of linear_kernels.py read them.

Two forms, each stacked over experts (one, for a plain layer): `Packed`, codes in 32-bit words that are widened to the
inputs' dtype on the way to the tensor cores; `Even`, weights of the type that the inputs are given too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from engines.ops.quantized import Float8Weight, GroupedIntWeight, Int8Weight, MXFP4Weight

WIDTH = {2: 16, 4: 16, 8: 32}
"""Words of a row in one chunk by the bits of a code: the depth of one product of the tensor cores, or two."""
BLOCK_K = 128
"""Columns of 8-bit inputs that are multiplied before their sum is scaled."""


@dataclass(frozen=True)
class Packed:
    """weight[e, n, permutation[e, k]] = (value of code k - zeros[e, g, n]) * scales[e, g, n], with g = k // group_size.

    A chunk is 32 / bits * WIDTH[bits] columns, filled up with zeros at a row's end; column p * WIDTH + j of a chunk is
    the field of word j that begins at bit p * bits. A chunk of all rows lies together, so that tiles are contiguous.
    """

    words: Tensor
    """[num_experts, num_chunks, out_features, WIDTH] int32"""
    scales: Tensor
    """[num_experts, num_groups, out_features]: float16 or bfloat16 where that is exact, else float32; for e2m1 the
    exponents, uint8"""
    zeros: Tensor | None
    """The same shape, uint8; None: 2 ** (bits - 1) for int, none for floats"""
    values: Literal["int", "e4m3", "e2m1"]
    bits: int
    group_size: int
    in_features: int
    permutation: Tensor | None = None
    """[num_experts, in_features] int64; None: inputs are in order."""

    @property
    def out_features(self) -> int:
        return self.words.shape[2]


@dataclass(frozen=True)
class Even:
    """weight[e, n, k] = data[e, n, k] * scales[e, k // group_size, n], for inputs of data's dtype."""

    data: Tensor
    """[num_experts, out_features, in_features]: int8, float8_e4m3fn, or the compute dtype"""
    scales: Tensor | None = None
    """[num_experts, num_groups, out_features] float32; one group for int8; None: all are 1"""
    group_size: int = 0
    """A multiple of BLOCK_K, or at least in_features."""
    input_scale: Tensor | None = None
    """[num_experts] float32; None: each token has its own, in each group."""

    @property
    def in_features(self) -> int:
        return self.data.shape[2]

    @property
    def out_features(self) -> int:
        return self.data.shape[1]


Stacked = Packed | Even


def pack_ints(weights: Sequence[GroupedIntWeight]) -> Packed:
    """All of one shape, bits and group size."""
    first = weights[0]
    words = _filled([pack_words(weight.codes, weight.bits) for weight in weights])
    scales = _narrow(_filled([weight.scales.T for weight in weights]))
    zeros: Tensor | None = _filled([weight.zeros.T.to(torch.uint8) for weight in weights])
    if zeros is not None and bool((zeros == 1 << (first.bits - 1)).all()):
        zeros = None
    order = None
    if any(weight.permutation is not None for weight in weights):
        plain = torch.arange(first.shape[1], device=words.device)
        order = _filled([plain if weight.permutation is None else weight.permutation for weight in weights])
    return Packed(words, scales, zeros, "int", first.bits, first.group_size, first.shape[1], order)


def pack_floats(weights: Sequence[Float8Weight]) -> Packed:
    """For inputs that stay as they are. All of one shape and tile."""
    words = _filled([pack_words(weight.data.view(torch.uint8), 8) for weight in weights])
    scales = _narrow(_filled([weight.by_row().scales.T for weight in weights]))
    return Packed(words, scales, None, "e4m3", 8, weights[0].tile[1], weights[0].shape[1])


def pack_mxfp4(weights: Sequence[MXFP4Weight]) -> Packed:
    """All of one shape."""

    def codes(weight: MXFP4Weight) -> Tensor:
        return torch.stack((weight.codes & 15, weight.codes >> 4), -1).flatten(1)

    words = _filled([pack_words(codes(weight), 4) for weight in weights])
    exponents = _filled([weight.exponents.T for weight in weights])
    return Packed(words, exponents, None, "e2m1", 4, 32, weights[0].shape[1])


def stack_ints(weights: Sequence[Int8Weight]) -> Even:
    """All of one shape."""
    scales = _filled([weight.scales.float()[None] for weight in weights])
    data = _filled([weight.data for weight in weights])
    return Even(data, scales, data.shape[2], _input_scales([weight.input_scale for weight in weights]))


def stack_floats(weights: Sequence[Float8Weight]) -> Even | None:
    """For inputs that are rounded to float8. None where columns do not come in groups of BLOCK_K. All of one shape and
    tile."""
    group_size, columns = weights[0].tile[1], weights[0].shape[1]
    if columns % BLOCK_K or (group_size % BLOCK_K and group_size < columns):
        return None
    scales = _filled([weight.by_row().scales.float().T for weight in weights])
    data = _filled([weight.data.view(torch.uint8) for weight in weights]).view(torch.float8_e4m3fn)
    return Even(data, scales, group_size, _input_scales([weight.input_scale for weight in weights]))


def stack_dense(weights: Sequence[Tensor]) -> Even:
    return Even(_filled(weights))


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """[num_chunks, rows, WIDTH] int32 of codes [rows, columns] uint8, as Packed has them."""
    pieces, width = 32 // bits, WIDTH[bits]
    fields = functional.pad(codes, (0, -codes.shape[1] % (pieces * width))).unflatten(1, (-1, pieces, width))
    words = torch.zeros(fields.shape[1], len(codes), width, dtype=torch.int32, device=codes.device)
    for piece in range(pieces):
        words |= (fields[:, :, piece].int() << (bits * piece)).transpose(0, 1)
    return words


def _filled(parts: Sequence[Tensor]) -> Tensor:
    """torch.stack without keeping more than one part in another order."""
    whole = torch.empty(len(parts), *parts[0].shape, dtype=parts[0].dtype, device=parts[0].device)
    for place, part in zip(whole, parts, strict=True):
        place.copy_(part)
    return whole


def _narrow(scales: Tensor) -> Tensor:
    """The same numbers in 16 bits if they fit."""
    for dtype in (torch.float16, torch.bfloat16):
        narrow = scales.to(dtype)
        if torch.equal(narrow.to(scales.dtype), scales):
            return narrow
    return scales.float()


def _input_scales(scales: Sequence[Tensor | None]) -> Tensor | None:
    known = [scale.float().reshape(()) for scale in scales if scale is not None]
    return torch.stack(known) if known and len(known) == len(scales) else None
