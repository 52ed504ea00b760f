"""GPTQ (arXiv 2210.17323): integers of 2, 4 or 8 bits, in the layout of AutoGPTQ and GPTQModel.

    qweight  [in_features * bits / 32, out_features] int32, inputs packed from the lowest bits
    qzeros   [groups, out_features * bits / 32] int32, outputs packed; in checkpoint_format `gptq` less one,
             where a zero of 0 becomes the largest code
    scales   [groups, out_features] float16
    g_idx    [in_features] int32: each input's group (desc_act, "act-order"); may be absent without it

weight[o, i] = (q - z) * scale of i's group. Source: github.com/AutoGPTQ/AutoGPTQ,
auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py; for `gptq_v2`, github.com/ModelCloud/GPTQModel, utils/model.py
(convert_gptq_v1_to_v2_format).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.api import UnsupportedModelError
from engines.formats._common import blank, expect, pack, quantize_groups, read_projection, unpack
from engines.ops.moe import Projection
from engines.ops.quantized import GroupedIntWeight
from engines.weights import Cut, LinearSource, StoredModule, Weights


def detect(quantization: dict[str, Any] | None) -> bool:
    return quantization is not None and quantization.get("quant_method") == "gptq"


def read(weights: Weights, source: LinearSource) -> Projection:
    """As engines.layers.linear.Format. Raises UnsupportedModelError for bits and formats that are not listed above."""
    config = weights.checkpoint.quantization
    assert config is not None
    bits = expect(config, "bits", config.get("bits"), (2, 4, 8))
    kind = expect(config, "checkpoint_format", config.get("checkpoint_format", "gptq"), ("gptq", "gptq_v2"))
    size = config.get("group_size", 128)
    group_size = source.in_features if size == -1 else size
    in_word = 32 // bits

    def part(module: StoredModule) -> GroupedIntWeight:
        (rows, inputs), name = module.shape, module.name
        groups, by_group = -(-inputs // group_size), module.columns.by(group_size)
        here = (module.columns.by(in_word), module.rows.by())
        packed = weights.read(f"{name}.qweight", (inputs // in_word, rows), torch.int32, *here)
        zeros_here = (by_group, module.rows.by(in_word))
        packed_zeros = weights.read(f"{name}.qzeros", (groups, rows // in_word), torch.int32, *zeros_here)
        scales = weights.read(f"{name}.scales", (groups, rows), torch.float32, by_group, module.rows.by())
        order = read_order(weights, f"{name}.g_idx", module.columns, group_size)
        if scales.is_meta:
            return blank((rows, inputs), bits, group_size)
        stored_less = 1 if kind == "gptq" else 0
        zeros = (unpack(packed_zeros, bits).T.to(torch.int16) + stored_less) & (2**bits - 1)
        codes = unpack(packed.T.contiguous(), bits)
        if order is not None:
            codes = codes[:, order]
        return GroupedIntWeight(codes, scales.T.contiguous(), zeros, bits, group_size, order)

    return read_projection(weights, source, part)


def read_order(weights: Weights, name: str, columns: Cut, group_size: int) -> Tensor | None:
    """The columns in the order of their groups; None where they are in order, or the checkpoint does not say.

    name: stored, of each input's group. Raises UnsupportedModelError as `column_order`, and for inputs that are cut and
    not in order.
    """
    if not weights.stored(name):
        return None
    g_idx = weights.read(name, (len(columns),), torch.int32, columns.by())
    if len(columns) == columns.total or g_idx.is_meta:
        return column_order(name, g_idx, group_size)
    inputs = torch.arange(columns.held[0].start, columns.held[0].stop, dtype=torch.int32, device=g_idx.device)
    if not torch.equal(g_idx, inputs // group_size):
        raise UnsupportedModelError(
            f"{name}: inputs are grouped in an order of their own (desc_act), which cannot be cut; expected one rank, "
            "or a checkpoint without it; use parallelism.dp"
        )
    return None


def column_order(name: str, g_idx: Tensor, group_size: int) -> Tensor | None:
    """The columns in the order of their groups; None where they are in order.

    Raises UnsupportedModelError for groups of different sizes: their scales could not be found by position.
    """
    if g_idx.is_meta:
        return None
    in_order = torch.arange(len(g_idx), dtype=torch.int32, device=g_idx.device) // group_size
    if torch.equal(g_idx, in_order):
        return None
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order], in_order):
        raise UnsupportedModelError(
            f"{name}: has groups that are not of {group_size} inputs each; expected equal groups; "
            "use a checkpoint of another quantizer"
        )
    return order


def quantize(
    weight: Tensor, bits: int, group_size: int, symmetric: bool = True, order: Tensor | None = None
) -> dict[str, Tensor]:
    """A checkpoint's tensors for a weight [out, in], rounded to nearest, by the ends of their names.

    order: [in] int64, the inputs in the order in which they are grouped (act-order).
    """
    order = torch.arange(weight.shape[1]) if order is None else order
    codes, scales, zeros = quantize_groups(weight[:, order], bits, group_size, symmetric)
    back = order.argsort()
    return {
        "qweight": pack(codes[:, back], bits).T.contiguous(),
        "qzeros": pack((zeros.T.int() - 1) & (2**bits - 1), bits),
        "scales": scales.T.half().contiguous(),
        "g_idx": (back // group_size).int(),
    }
