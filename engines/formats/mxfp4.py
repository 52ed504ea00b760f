"""gpt-oss: experts in 4-bit floats with a shared exponent for each 32 inputs (OCP Microscaling Formats 1.0).

    <name>_blocks  [num_experts, out_features, in_features / 32, 16] uint8: two codes a byte, first the lower
    <name>_scales  [num_experts, out_features, in_features / 32] uint8: exponents, biased by 127
    <name>_bias    [num_experts, out_features]

All other weights are plain. Source: gpt_oss/torch/weights.py of github.com/openai/gpt-oss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.formats import dense
from engines.ops.moe import Projection
from engines.ops.quantized import E2M1, MXFP4Weight
from engines.weights import Cut, LinearSource, Weights


def detect(quantization: dict[str, Any] | None) -> bool:
    return quantization is not None and quantization.get("quant_method") == "mxfp4"


def read(weights: Weights, source: LinearSource) -> Projection:
    """As engines.layers.linear.Format: only experts are quantized."""
    return dense.read(weights, source)


def read_stacked(weights: Weights, name: str, experts: Cut, rows: Cut, columns: Cut) -> list[Projection]:
    """As dense.read_stacked."""
    stored = weights.stored_name(name)
    shape = (len(experts), len(rows), len(columns) // 32)
    held = (experts.by(), rows.by(), columns.by(32))
    blocks = weights.read(f"{stored}_blocks", (*shape, 16), torch.uint8, *held)
    exponents = weights.read(f"{stored}_scales", shape, torch.uint8, *held)
    biases = dense.read_biases(weights, name, experts, rows, columns)
    return [
        Projection(MXFP4Weight(codes.flatten(1), powers), bias)
        for codes, powers, bias in zip(blocks, exponents, biases, strict=True)
    ]


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """A checkpoint's tensors for weights [num_experts, out, in], by the ends of their names.

    The shared exponent is that of the largest magnitude, less E2M1's own largest exponent (OCP MX 1.0, section 6.3).
    """
    grouped = weight.float().unflatten(-1, (-1, 32))
    exponents = (grouped.abs().amax(-1).clamp(min=2.0**-120).log2().floor() - 2).clamp(-127, 127)
    scaled = (grouped / torch.exp2(exponents)[..., None]).clamp(-6, 6)
    codes = (scaled.abs()[..., None] - torch.tensor(E2M1)).abs().argmin(-1) + 8 * (scaled < 0)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return {"blocks": blocks, "scales": (exponents + 127).to(torch.uint8)}
