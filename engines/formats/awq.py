"""AWQ (arXiv 2306.00978): 4-bit integers, in the `gemm` layout of AutoAWQ.

    qweight  [in_features, out_features / 8] int32
    qzeros   [in_features / group_size, out_features / 8] int32
    scales   [in_features / group_size, out_features] float16

A word holds eight output features; its 4-bit fields, from the lowest, are features 0, 2, 4, 6, 1, 3, 5, 7 of the eight.
weight[o, i] = (q - z) * scale. Source: github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py and
awq/utils/packing_utils.py (AWQ_ORDER).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.formats._common import blank, expect, pack, quantize_groups, read_projection, unpack
from engines.ops.moe import Projection
from engines.ops.quantized import GroupedIntWeight
from engines.weights import LinearSource, StoredModule, Weights

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The feature, of eight, in each 4-bit field of a word from the lowest."""


def detect(quantization: dict[str, Any] | None) -> bool:
    return quantization is not None and quantization.get("quant_method") == "awq"


def read(weights: Weights, source: LinearSource) -> Projection:
    """As engines.layers.linear.Format. Raises UnsupportedModelError for other layouts than gemm, other bits than 4."""
    config = weights.checkpoint.quantization
    assert config is not None
    expect(config, "version", str(config.get("version", "gemm")).lower(), ("gemm",))
    expect(config, "bits", config.get("bits", config.get("w_bit", 4)), (4,))
    size = config.get("group_size", config.get("q_group_size", 128))
    group_size = source.in_features if size == -1 else size

    def part(module: StoredModule) -> GroupedIntWeight:
        (rows, inputs), name = module.shape, module.name
        groups, by_group = -(-inputs // group_size), module.columns.by(group_size)
        by_word = module.rows.by(8)
        codes = weights.read(f"{name}.qweight", (inputs, rows // 8), torch.int32, module.columns.by(), by_word)
        zeros = weights.read(f"{name}.qzeros", (groups, rows // 8), torch.int32, by_group, by_word)
        scales = weights.read(f"{name}.scales", (groups, rows), torch.float32, by_group, module.rows.by())
        if scales.is_meta:
            return blank((rows, inputs), 4, group_size)
        return GroupedIntWeight(
            _unpack(codes).T.contiguous(), scales.T.contiguous(), _unpack(zeros).T.to(torch.int16), 4, group_size
        )

    return read_projection(weights, source, part)


def quantize(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """A checkpoint's tensors for a weight [out, in], rounded to nearest, by the ends of their names."""
    codes, scales, zeros = quantize_groups(weight, 4, group_size, symmetric=False)
    return {"qweight": _pack(codes.T), "qzeros": _pack(zeros.T), "scales": scales.T.half().contiguous()}


def _unpack(packed: Tensor) -> Tensor:
    """[n, words] -> [n, 8 * words], features in order."""
    fields = unpack(packed, 4).unflatten(1, (-1, 8))
    codes = torch.empty_like(fields)
    for place, feature in enumerate(ORDER):
        codes[..., feature] = fields[..., place]
    return codes.flatten(1)


def _pack(codes: Tensor) -> Tensor:
    return pack(codes.unflatten(1, (-1, 8))[..., list(ORDER)].flatten(1), 4)
