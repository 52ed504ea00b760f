"""Blocks between two attentions (engines/ops/block.py), and what they give op by op."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.formats import int8
from engines.formats._common import quantize_groups
from engines.ops import OpSet
from engines.ops.block import Block, NormWeight
from engines.ops.linear import LinearWeight
from engines.ops.quantized import GroupedIntWeight


@dataclass(frozen=True)
class BlockCase:
    name: str
    hidden: int
    inner: int
    attended: int
    into: int
    """Outputs of the next projection; 0: there is none."""
    layer_norm: bool = False
    formats: tuple[str, str, str, str] = ("", "", "", "")
    """out, up, down, into: plain, int8, w8 or w4"""
    offset: float = 0.0


CASES = (
    BlockCase("decoder", 64, 96, 48, 128),
    BlockCase("last", 64, 96, 64, 0),
    BlockCase("no whole tiles", 72, 48, 40, 50, offset=1.0),
    BlockCase("encoder", 64, 128, 64, 192, layer_norm=True),
    BlockCase("last of an encoder", 40, 72, 40, 0, layer_norm=True),
    BlockCase("int8", 64, 96, 48, 128, formats=("int8",) * 4),
    BlockCase("partly int8", 72, 48, 40, 50, formats=("", "int8", "", "int8")),
    BlockCase("codes", 64, 96, 48, 128, formats=("w8", "w4", "w4", "w8")),
    BlockCase("all kinds", 64, 96, 40, 50, formats=("", "w8", "int8", "w4")),
    BlockCase("codes of an encoder", 72, 128, 72, 40, layer_norm=True, formats=("w8", "w8", "w4", "")),
)
ROWS = (1, 17, 33, 128, 150, 700)
"""On both sides of where threads share rows and not weights, and of what goes together."""


def codes_of(weight: Tensor, bits: int) -> GroupedIntWeight:
    """8 bits: a scale for each output; 4: with zeros, of groups of 32 where they divide the inputs."""
    size = weight.shape[1] if bits == 8 or weight.shape[1] % 32 else 32
    codes, scales, zeros = quantize_groups(weight, bits, size, symmetric=bits == 8)
    return GroupedIntWeight(codes, scales, zeros.to(torch.int16), bits, size)


def make(ops: OpSet, case: BlockCase, dtype: torch.dtype = torch.bfloat16) -> Block:
    generator = torch.Generator().manual_seed(case.hidden)

    def weight(out: int, size: int, fmt: str) -> LinearWeight:
        made = (torch.randn(out, size, generator=generator) * size**-0.5).to(dtype)
        bias = torch.randn(out, generator=generator).to(dtype) if case.layer_norm else None
        if not fmt:
            return ops.prepare_linear(made, bias)
        return ops.prepare_quantized(
            int8.quantize(made) if fmt == "int8" else codes_of(made, int(fmt[1:])), bias, dtype
        )

    def norm() -> NormWeight:
        made, bias = (torch.randn(case.hidden, generator=generator).to(dtype) for _ in range(2))
        return NormWeight(made, bias if case.layer_norm else None, 1e-5, case.offset)

    out, up, down, into = case.formats
    gated = not case.layer_norm
    return Block(
        weight(case.hidden, case.attended, out),
        norm(),
        weight(2 * case.inner if gated else case.inner, case.hidden, up),
        weight(case.hidden, case.inner, down),
        "silu" if gated else "gelu",
        gated,
        norm(),
        weight(case.into, case.hidden, into) if case.into else None,
    )


def inputs(case: BlockCase, rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """(attended, whose rows lie apart; residual)"""
    generator = torch.Generator().manual_seed(rows)
    attended = torch.randn(rows, case.attended + 32, generator=generator).to(dtype)[:, : case.attended]
    return attended, torch.randn(rows, case.hidden, generator=generator).to(dtype)


def one_by_one(ops: OpSet, block: Block, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(result, residual), each op by itself."""

    def normed(x: Tensor, norm: NormWeight, residual: Tensor) -> tuple[Tensor, Tensor]:
        if norm.bias is None:
            return ops.add_rms_norm(x, residual, norm.weight, norm.eps, norm.offset)
        made = ops.layer_norm(x, norm.weight, norm.bias, norm.eps, residual)
        return made, made

    x, residual = normed(ops.linear(attended, block.out), block.norm, residual)
    x = ops.linear(x, block.up)
    x = ops.act_and_mul(x, block.activation) if block.gated else ops.act(x, block.activation)
    x, residual = normed(ops.linear(x, block.down), block.next_norm, residual)
    return x if block.into is None else ops.linear(x, block.into), residual


def runs(ops: OpSet) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(result, residual, and both op by op) of every case that the op set makes in one call."""
    for case in CASES:
        block = make(ops, case)
        run = ops.prepare_block(block)
        if run is None:
            continue
        for rows in ROWS:
            attended, residual = inputs(case, rows)
            expected = one_by_one(ops, block, attended, residual.clone())
            yield run(attended, residual), residual, *expected
