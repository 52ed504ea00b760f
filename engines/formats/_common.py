"""What quantized formats share: parts read one by one, biases, and integers packed in 32-bit words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engines.api import UnsupportedModelError
from engines.checkpoint import FLOAT_DTYPES
from engines.ops.moe import Projection
from engines.ops.quantized import GroupedIntWeight, QuantizedWeight, Weight, concatenate
from engines.weights import LinearSource, StoredModule, Weights

ReadPart = Callable[[StoredModule], QuantizedWeight]
"""The held part of a module's weight"""


def read_projection(weights: Weights, source: LinearSource, read_part: ReadPart) -> Projection:
    """The projections of a source as one weight.

    A module that the checkpoint keeps as a plain float weight is read as that: formats leave heads, and whatever else
    their configuration names, unquantized. Parts that one class cannot hold are dequantized into one dense weight. A
    bias that only the checkpoint knows of is kept: quantizers write zeros where a model has none.
    """
    modules, order = weights.modules(source)
    parts = [_read(weights, module, read_part) for module in modules]
    weight = concatenate(parts)
    if weight is None:
        dtype = weights.dtype
        weight = torch.cat([part if isinstance(part, Tensor) else part.dequantize(dtype) for part in parts])
    bias = _bias(weights, source, modules)
    if order is not None:
        weight = weight[order] if isinstance(weight, Tensor) else weight.rows(order)
        bias = None if bias is None else bias[order]
    return Projection(weight, bias)


def _read(weights: Weights, module: StoredModule, read_part: ReadPart) -> Weight:
    name = f"{module.name}.weight"
    plain = weights.checkpoint.tensors.get(name)
    if plain is not None and plain.dtype in FLOAT_DTYPES:
        return weights.read(name, module.shape, weights.dtype, module.rows.by(), module.columns.by())
    return read_part(module)


def _bias(weights: Weights, source: LinearSource, modules: list[StoredModule]) -> Tensor | None:
    if not source.has_bias or not (source.bias or any(weights.stored(f"{m.name}.bias") for m in modules)):
        return None
    return torch.cat(
        [
            weights.read(f"{m.name}.bias", (len(m.rows),), weights.dtype, m.rows.by())
            if source.bias or weights.stored(f"{m.name}.bias")
            else torch.zeros(len(m.rows), dtype=weights.dtype, device=weights.device)
            for m in modules
        ]
    )


def blank(shape: tuple[int, int], bits: int, group_size: int) -> GroupedIntWeight:
    """A weight without data, for while only headers are read: unpacking on the meta device would take seconds."""
    scales = torch.empty(shape[0], -(-shape[1] // group_size), device="meta")
    codes = torch.empty(shape, dtype=torch.uint8, device="meta")
    return GroupedIntWeight(codes, scales, torch.empty_like(scales, dtype=torch.int16), bits, group_size)


def expect(config: dict[str, Any], key: str, found: object, allowed: tuple[object, ...]) -> Any:
    """found. Raises UnsupportedModelError where it is not one of those that the format's code reads."""
    if found not in allowed:
        method = config.get("quant_method", "compressed-tensors")
        raise UnsupportedModelError(
            f"config.json: quantization_config of {method} has {key} {found!r}; expected one of "
            f"{', '.join(repr(value) for value in allowed)}; use a checkpoint that was quantized so"
        )
    return found


def unpack(packed: Tensor, bits: int) -> Tensor:
    """[rows, words] int32 -> [rows, words * 32 / bits] uint8: the lowest bits of a word are its first code.

    bits: 2, 4 or 8, so that no code lies across bytes. Words are little-endian, as all machines of interest have them.
    """
    in_bytes = packed.flatten().view(torch.uint8).view(*packed.shape[:-1], -1)
    per_byte = 8 // bits
    codes = torch.empty(*in_bytes.shape, per_byte, dtype=torch.uint8, device=packed.device)
    for i in range(per_byte):
        torch.bitwise_and(in_bytes >> (bits * i), 2**bits - 1, out=codes[..., i])
    return codes.flatten(-2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """The inverse of unpack; the last word of a row is filled up with zeros."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % per_word))
    words = (padded.unflatten(1, (-1, per_word)) << (torch.arange(per_word) * bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def quantize_groups(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [out, in] uint8, scales [out, groups] float32, zeros [out, groups] uint8), rounded to nearest.

    weight: [out, in]; in is a multiple of group_size. Symmetric: the zero is 2 ** (bits - 1).
    """
    grouped = weight.float().unflatten(1, (-1, group_size))
    top = 2**bits - 1
    if symmetric:
        zeros = torch.full(grouped.shape[:2], 2 ** (bits - 1))
        scales = grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = (high - low) / top
        zeros = (-low / scales.clamp(min=1e-12)).round().clamp(0, top).long()
    scales = scales.clamp(min=1e-12)
    codes = (grouped / scales[..., None]).round() + zeros[..., None]
    return codes.clamp(0, top).to(torch.uint8).flatten(1), scales, zeros.to(torch.uint8)
