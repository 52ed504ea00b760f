"""Quantized weights as op sets get them: one class for each arithmetic, whatever the checkpoint's packing was.

engines/formats turns files into these; `prepare_quantized` (engines/ops/linear.py) turns these into what an op set
multiplies. Codes are not packed here: packing is the op set's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of a 4-bit float by its lower three bits; the fourth is the sign (OCP MX specification 1.0, section 5.3.3)."""


@dataclass(frozen=True)
class GroupedIntWeight:
    """Integers with a scale and a zero for each group of columns: AWQ, GPTQ, w4a16 and w8a16 of compressed-tensors.

    weight[o, permutation[j]] = (codes[o, j] - zeros[o, j // group_size]) * scales[o, j // group_size]
    """

    codes: Tensor
    """[out_features, in_features] uint8, one code a byte, below 2 ** bits"""
    scales: Tensor
    """[out_features, ceil(in_features / group_size)] float32"""
    zeros: Tensor
    """The same shape, int16: below 2 ** bits"""
    bits: int
    group_size: int
    permutation: Tensor | None = None
    """[in_features] int64 (GPTQ's act-order): the input that column j multiplies; None: input j."""

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out_features, in_features]; product in float32 (float64 for float64 scales), rounded once."""
        zeros, columns, size = self.zeros.to(self.scales.dtype), self.codes.shape[1], self.group_size
        weight = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for rows in in_cache(self.shape):
            if columns % size == 0:
                grouped = self.codes[rows].unflatten(1, (-1, size)).to(self.scales.dtype)
                weight[rows] = grouped.sub_(zeros[rows, :, None]).mul_(self.scales[rows, :, None]).flatten(1)
            else:
                zero, scale = (t[rows].repeat_interleave(size, 1)[:, :columns] for t in (zeros, self.scales))
                weight[rows] = (self.codes[rows] - zero) * scale
        if self.permutation is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.permutation, weight)

    def rows(self, index: Tensor) -> GroupedIntWeight:
        """Some of the output features. index: [n] int64."""
        return replace(self, codes=self.codes[index], scales=self.scales[index], zeros=self.zeros[index])


@dataclass(frozen=True)
class Int8Weight:
    """Signed 8-bit integers with a scale for each output feature, for products with 8-bit inputs (SmoothQuant).

    weight[o, i] = data[o, i] * scales[o]
    """

    data: Tensor
    """[out_features, in_features] int8"""
    scales: Tensor
    """[out_features] float32"""
    input_scale: Tensor | None = None
    """[] float32: inputs are rounded to multiples of it; None: each token has its own, largest magnitude / 127."""

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return (self.data.to(self.scales.dtype) * self.scales[:, None]).to(dtype)

    def rows(self, index: Tensor) -> Int8Weight:
        return replace(self, data=self.data[index], scales=self.scales[index])


@dataclass(frozen=True)
class Float8Weight:
    """8-bit floats with a scale for each tile.

    weight[o, i] = data[o, i] * scales[o // tile[0], i // tile[1]]
    """

    data: Tensor
    """[out_features, in_features] float8_e4m3fn"""
    scales: Tensor
    """[ceil(out_features / tile[0]), ceil(in_features / tile[1])] float32"""
    tile: tuple[int, int]
    """(128, 128) as DeepSeek V3; (1, in_features): a scale for each output feature."""
    input_scale: Tensor | None = None
    """[] float32 (float8 = input / input_scale), where the checkpoint was calibrated for one.

    An op set with 8-bit float products may round inputs to float8: by this scale, else by one for each token (and 128
    columns, where the tile has as many). One without multiplies inputs as they are.
    """

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out_features, in_features]; product in float32 (float64 for float64 scales), rounded once."""
        columns, tile = self.data.shape[1], self.tile[1]
        scales = self.by_row().scales
        weight = torch.empty(self.shape, dtype=dtype, device=self.data.device)
        for rows in in_cache(self.shape):
            wide = self.data[rows].to(scales.dtype)
            if columns % tile == 0:
                weight[rows] = wide.unflatten(1, (-1, tile)).mul_(scales[rows, :, None]).flatten(1)
            else:
                weight[rows] = wide.mul_(scales[rows].repeat_interleave(tile, 1)[:, :columns])
        return weight

    def rows(self, index: Tensor) -> Float8Weight:
        """Some of the output features. Tiles stay as they are where rows move within their own only."""
        inside = torch.arange(len(self.data), device=index.device) // self.tile[0]
        if len(index) == len(inside) and torch.equal(index // self.tile[0], inside):
            return replace(self, data=self.data[index])
        own = self.by_row()
        return replace(own, data=own.data[index], scales=own.scales[index])

    def by_row(self) -> Float8Weight:
        """The same weight with tiles of one row."""
        scales = self.scales.repeat_interleave(self.tile[0], 0)[: self.data.shape[0]]
        return replace(self, scales=scales, tile=(1, self.tile[1]))


@dataclass(frozen=True)
class MXFP4Weight:
    """4-bit floats (E2M1) in groups of 32 columns that share a power of two: OCP Microscaling Formats 1.0.

    weight[o, i] = E2M1(code of i) * 2 ** (exponents[o, i // 32] - 127)
    """

    codes: Tensor
    """[out_features, in_features / 2] uint8: column 2j in the lower half of a byte, 2j + 1 in the upper"""
    exponents: Tensor
    """[out_features, in_features / 32] uint8"""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.codes.shape[0], 2 * self.codes.shape[1]))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out_features, in_features]: exact in float32 and bfloat16."""
        positive = torch.tensor(E2M1, dtype=torch.float32, device=self.codes.device)
        single = torch.cat((positive, -positive))
        pairs = torch.stack((single.repeat(16), single.repeat_interleave(16)), 1)  # by byte: its two columns
        powers = torch.ldexp(torch.ones_like(self.exponents, dtype=torch.float32), self.exponents.int() - 127)
        weight = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for rows in in_cache(self.shape):
            values = pairs.index_select(0, self.codes[rows].flatten().int())
            weight[rows] = values.view(-1, powers.shape[1], 32).mul_(powers[rows, :, None]).flatten(1)
        return weight

    def rows(self, index: Tensor) -> MXFP4Weight:
        return MXFP4Weight(self.codes[index], self.exponents[index])


def in_cache(shape: torch.Size) -> Iterator[slice]:
    """Rows of a weight, so many at a time that their float32 form stays in the processor's cache."""
    step = max(1, (1 << 18) // max(1, shape[1]))
    for first in range(0, shape[0], step):
        yield slice(first, first + step)


QuantizedWeight = GroupedIntWeight | Int8Weight | Float8Weight | MXFP4Weight
Weight = Tensor | QuantizedWeight


def concatenate(parts: Sequence[Weight]) -> Weight | None:
    """Parts one below the other as one weight; None where one class cannot hold them: parts of different formats, of
    different input orders or scales of the input."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(type(part) is not type(first) for part in parts):
        return None
    if isinstance(first, Tensor):
        return _cat([part for part in parts if isinstance(part, Tensor)])
    if isinstance(first, GroupedIntWeight):
        return _grouped([part for part in parts if isinstance(part, GroupedIntWeight)])
    if isinstance(first, Int8Weight):
        ints = [part for part in parts if isinstance(part, Int8Weight)]
        if not _same([part.input_scale for part in ints]):
            return None
        return replace(first, data=_cat([p.data for p in ints]), scales=_cat([p.scales for p in ints]))
    if isinstance(first, Float8Weight):
        return _floats([part for part in parts if isinstance(part, Float8Weight)])
    mx = [part for part in parts if isinstance(part, MXFP4Weight)]
    return MXFP4Weight(_cat([part.codes for part in mx]), _cat([part.exponents for part in mx]))


def _grouped(parts: list[GroupedIntWeight]) -> GroupedIntWeight | None:
    if len({(part.bits, part.group_size) for part in parts}) > 1 or not _same([part.permutation for part in parts]):
        return None
    codes, scales, zeros = (_cat([getattr(p, name) for p in parts]) for name in ("codes", "scales", "zeros"))
    return replace(parts[0], codes=codes, scales=scales, zeros=zeros)


def _floats(parts: list[Float8Weight]) -> Float8Weight | None:
    if len({part.tile for part in parts}) > 1:
        return None
    if any(part.data.shape[0] % part.tile[0] for part in parts[:-1]):
        parts = [part.by_row() for part in parts]
    scales = [part.input_scale for part in parts]
    known = [scale for scale in scales if scale is not None]
    # The widest range serves all: inputs of merged projections are one and the same tensor.
    largest = torch.stack(known).amax() if len(known) == len(scales) else None
    data, tiles = (_cat([getattr(part, name) for part in parts]) for name in ("data", "scales"))
    return replace(parts[0], data=data, scales=tiles, input_scale=largest)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """torch.cat, but that on the meta device goes through Python that takes seconds to import."""
    if tensors[0].is_meta:
        return tensors[0].new_empty(sum(len(t) for t in tensors), *tensors[0].shape[1:])
    return torch.cat(list(tensors))


def _same(tensors: Sequence[Tensor | None]) -> bool:
    first = tensors[0]
    if first is None or any(t is None for t in tensors):
        return all(t is None for t in tensors)
    return first.is_meta or all(t is not None and torch.equal(first, t) for t in tensors)
