"""What formats share that quantize plain weights while they are loaded: which ones, and 8-bit integers by rows.

Nothing is calibrated, and no checkpoint is stored so. Left in the compute dtype: heads, whose errors go straight into
the tokens; routers of mixtures, whose errors choose other experts; and what latent attention multiplies into its
queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engines.formats import dense
from engines.ops.moe import Projection
from engines.ops.quantized import QuantizedWeight, in_cache
from engines.weights import Cut, LinearSource, Weights

PLAIN = ("lm_head", "score", "classifier", "pooler", "gate", "router", "kv_b_proj")
"""Ends of the names of projections that stay as they are."""
Quantize = Callable[[Tensor], QuantizedWeight]
"""A weight [out_features, in_features], of any float dtype, or on the meta device"""


def detect(quantization: dict[str, Any] | None) -> bool:
    """No checkpoint is stored so: model.quantization asks for it."""
    return False


def read_quantized(quantize: Quantize, weights: Weights, source: LinearSource) -> Projection:
    """As engines.layers.linear.Format."""
    read = dense.read(weights, source)
    plain = any(name.rpartition(".")[2] in PLAIN for name in source.names)
    return read if plain else _quantized(read, quantize)


def read_stacked_quantized(
    quantize: Quantize, weights: Weights, name: str, experts: Cut, rows: Cut, columns: Cut
) -> list[Projection]:
    """As dense.read_stacked."""
    return [_quantized(read, quantize) for read in dense.read_stacked(weights, name, experts, rows, columns)]


def integers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [out_features, in_features], scales float32 [out_features]): rounded to nearest; the largest
    magnitude of a row is 127."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = weight.new_empty(len(weight), dtype=torch.float32)
    if weight.is_meta:
        return codes, scales
    for rows in in_cache(weight.shape):
        wide = weight[rows].float()
        scales[rows] = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        codes[rows] = (wide / scales[rows, None]).round_()
    return codes, scales


def _quantized(read: Projection, quantize: Quantize) -> Projection:
    assert isinstance(read.weight, Tensor)
    return Projection(quantize(read.weight), read.bias)
