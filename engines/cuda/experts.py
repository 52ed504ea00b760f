"""The experts of a layer as the compiled kernels read them: one stack of packed weights for each projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engines.cuda.quantized import PackedWeight, in_lane_order, pack
from engines.ops.moe import Projection

TILES = {"dense": (16, 64, 128), "int8": (16, 64, 128)}
"""Slots of a tile that kernels of a format are compiled for (csrc/cuda/product_*.cu)."""
PACKED_TILES = (16, 64)
"""The same of the other formats."""


@dataclass(frozen=True)
class PackedExperts:
    """One projection of all experts."""

    weight: PackedWeight
    bias: Tensor | None
    """[experts, out_features]"""
    out_features: int

    def tile(self, num_slots: int) -> int:
        """Slots of a tile: the least that the mean expert's fit in, else the largest."""
        mean = num_slots / len(self.weight.codes)
        sizes = TILES.get(self.weight.format, PACKED_TILES)
        return next((size for size in sizes if mean <= size), sizes[-1])


def pack_experts(projections: Sequence[Projection], dtype: torch.dtype) -> PackedExperts:
    """Weights that no kernel takes, or not all of them in one format, become dense, of `dtype`."""
    first = projections[0].weight
    packed = _stack([pack_projection(p) for p in projections])
    if packed is None:
        dense = (p.weight if isinstance(p.weight, Tensor) else p.weight.dequantize(dtype) for p in projections)
        codes: Tensor | None = None
        for i, weight in enumerate(dense):
            own = in_lane_order(weight)
            codes = own.new_empty(len(projections), *own.shape) if codes is None else codes
            codes[i] = own
        assert codes is not None
        packed = PackedWeight("dense", codes, None)
    biases = [p.bias for p in projections if p.bias is not None]
    assert len(biases) in (0, len(projections)), "biases of some experts only"
    return PackedExperts(packed, torch.stack(biases) if biases else None, first.shape[0])


def pack_projection(projection: Projection) -> PackedWeight | None:
    """None for a plain weight, and for one whose inputs are its own: permuted, or rounded by a scale of its own."""
    if isinstance(projection.weight, Tensor):
        return None
    packed = pack(projection.weight)
    if packed is None or packed.permutation is not None or packed.input_scale is not None:
        return None
    return packed


def _stack(weights: Sequence[PackedWeight | None]) -> PackedWeight | None:
    found = [weight for weight in weights if weight is not None]
    if len(found) < len(weights) or len({(w.format, w.codes.shape) for w in found}) > 1:
        return None
    scales = [weight.scales for weight in found if weight.scales is not None]
    if len({tuple(scale.shape) for scale in scales}) > 1:
        return None
    return replace(found[0], codes=torch.cat([w.codes for w in found]), scales=torch.cat(scales))
