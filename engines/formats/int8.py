"""Plain weights that are quantized while they are loaded: 8-bit integers with a scale for each output feature.

Products are with 8-bit inputs, each token by its own largest magnitude (engines/ops/quantized.py: Int8Weight). Nothing
is calibrated. Asked for by model.quantization=int8; no checkpoint is stored so.

Left in the compute dtype: heads, whose errors go straight into the tokens; routers of mixtures, whose errors choose
other experts; and what latent attention multiplies into its queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.formats import dense
from engines.ops.moe import Projection
from engines.ops.quantized import Int8Weight
from engines.weights import Cut, LinearSource, Weights

PLAIN = ("lm_head", "score", "classifier", "pooler", "gate", "router", "kv_b_proj")
"""Ends of the names of projections that stay as they are."""


def detect(quantization: dict[str, Any] | None) -> bool:
    return False


def read(weights: Weights, source: LinearSource) -> Projection:
    """As engines.layers.linear.Format."""
    read = dense.read(weights, source)
    plain = any(name.rpartition(".")[2] in PLAIN for name in source.names)
    return read if plain else _quantized(read)


def read_stacked(weights: Weights, name: str, experts: Cut, rows: Cut, columns: Cut) -> list[Projection]:
    """As dense.read_stacked."""
    return [_quantized(read) for read in dense.read_stacked(weights, name, experts, rows, columns)]


def quantize(weight: Tensor) -> Int8Weight:
    """weight: [out_features, in_features], rounded to nearest; the largest magnitude of a row is 127."""
    if weight.is_meta:
        return Int8Weight(weight.to(torch.int8), weight.new_empty(len(weight), dtype=torch.float32))
    wide = weight.float()
    scales = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return Int8Weight((wide / scales[:, None]).round().to(torch.int8), scales)


def _quantized(read: Projection) -> Projection:
    assert isinstance(read.weight, Tensor)
    return Projection(quantize(read.weight), read.bias)
