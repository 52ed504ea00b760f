"""Several products in one call: what is between them stays in a thread's cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.cpu.compiled import ACTIVATIONS
from engines.cpu.linear import PackedWeight
from engines.ops import OpSet
from engines.ops import linear as reference
from engines.ops.block import Block, NormWeight, RunBlock
from engines.ops.linear import Inputs, LinearWeight


def mlp(self: OpSet, x: Inputs, up: LinearWeight, down: LinearWeight, activation: str, gated: bool) -> Tensor:
    """As the reference. Packed weights: one call."""
    if not _packed_mlp(up, down, gated):
        return reference.mlp(self, x, up, down, activation, gated)
    arguments = (*_product(up), *_product(down), down.in_features, down.out_features, ACTIVATIONS[activation], gated)
    result: Tensor = torch.ops.cpu_ops.mlp_packed(x, *arguments)
    return result


def prepare_block(self: OpSet, block: Block) -> RunBlock | None:
    """As the reference. Packed weights: one call."""
    packed = [block.out, *([block.into] if block.into else [])]
    if not (_packed_mlp(block.up, block.down, block.gated) and all(isinstance(w.data, PackedWeight) for w in packed)):
        return None
    if (block.norm.bias is None) != (block.next_norm.bias is None) or block.norm.weight.dtype != torch.bfloat16:
        return None
    arguments = (
        *(*_product(block.out), *_norm(block.norm), *_product(block.up), *_product(block.down)),
        *(block.down.in_features, ACTIVATIONS[block.activation], block.gated),
        *(*_norm(block.next_norm), *_product(block.into), block.into.out_features if block.into else 0),
    )
    op = torch.ops.cpu_ops.block_packed.default

    def run(attended: Tensor, residual: Tensor) -> Tensor:
        result: Tensor = op(attended, residual, *arguments)
        return result

    return run


def _packed_mlp(up: LinearWeight, down: LinearWeight, gated: bool) -> bool:
    whole_tiles = down.in_features % 16 == 0 or not gated
    return isinstance(up.data, PackedWeight) and isinstance(down.data, PackedWeight) and whole_tiles


def _product(weight: LinearWeight | None) -> tuple[Any, ...]:
    if weight is None:
        return (None,) * 4
    return weight.data.data, weight.bias, weight.data.scales, weight.data.input_scale


def _norm(norm: NormWeight) -> tuple[Any, ...]:
    return norm.weight, norm.bias, norm.eps, norm.offset
