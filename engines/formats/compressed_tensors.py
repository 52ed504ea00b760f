"""What llm-compressor writes: one configuration for 4-bit and 8-bit weights, with or without 8-bit inputs.

    pack-quantized    weight_packed [out, ceil(in * bits / 32)] int32, codes from the lowest bits, offset by
                      2 ** (bits - 1); weight_scale [out, groups]; weight_zero_point [ceil(out * bits / 32), groups]
                      int32, packed along outputs, only where not symmetric; weight_g_idx [in] with actorder `group`;
                      weight_shape [2]
    int-quantized     weight [out, in] int8; weight_scale [out, 1] or [out, groups]
    float-quantized   weight [out, in] float8_e4m3fn; weight_scale [out, 1], one number, or a tile each
    naive-quantized   one of the last two

input_scale: one number, where inputs have a fixed scale. Source: github.com/vllm-project/compressed-tensors,
compressors/pack_quantized and quantization/quant_args.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engines.formats import fp8, gptq
from engines.formats._common import blank, expect, pack, quantize_groups, read_projection, unpack
from engines.ops.moe import Projection
from engines.ops.quantized import Float8Weight, GroupedIntWeight, Int8Weight, QuantizedWeight
from engines.weights import LinearSource, StoredModule, Weights

IGNORED = fp8.IGNORED
METHODS = ("compressed-tensors", "compressed_tensors", "sparseml")
INTEGER_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
FLOAT_FORMATS = ("float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Scheme:
    """What the configuration says of the quantized linear layers."""

    packed: bool
    float8: bool
    bits: int
    strategy: str
    """tensor, channel, group or block: what has a scale of its own."""
    group_size: int
    """For strategy group."""
    block: tuple[int, int] | None
    symmetric: bool
    inputs: str
    """none, dynamic or static: whether products are with 8-bit inputs, and where their scale comes from."""


def detect(quantization: dict[str, Any] | None) -> bool:
    if quantization is None:
        return False
    return quantization.get("quant_method") in METHODS or "config_groups" in quantization


def scheme(config: dict[str, Any]) -> Scheme:
    """Raises UnsupportedModelError for several different schemes, or one that is none of those above."""
    groups = list((config.get("config_groups") or {}).values())
    kinds = [(group.get("weights"), group.get("input_activations")) for group in groups]
    expect(
        config, "number of different config_groups", sum(kind not in kinds[:i] for i, kind in enumerate(kinds)), (1,)
    )
    said, inputs = kinds[0][0] or {}, kinds[0][1]
    expect(config, "sparsity", (config.get("sparsity_config") or {}).get("format", "dense"), ("dense",))
    float8 = said.get("type", "int") == "float"
    stored = groups[0].get("format") or config.get("format")
    stored = expect(config, "format", stored, FLOAT_FORMATS if float8 else INTEGER_FORMATS)
    bits = expect(config, "num_bits", said.get("num_bits", 8), (8,) if float8 or stored != "pack-quantized" else (4, 8))
    strategy = said.get("strategy") or ("group" if said.get("group_size") else "tensor")
    strategies = ("tensor", "channel", "block") if float8 else ("channel", "group")
    expect(config, "strategy", strategy, strategies)
    symmetric = bool(said.get("symmetric", True))
    if stored != "pack-quantized":
        expect(config, "symmetric", symmetric, (True,))
    if inputs:
        expect(config, "input type", inputs.get("type", "int"), ("float",) if float8 else ("int",))
        expect(config, "input num_bits", inputs.get("num_bits", 8), (8,))
        expect(config, "symmetric inputs", inputs.get("symmetric", True), (True,))
        if stored == "pack-quantized" or strategy == "group":
            expect(config, "input_activations", "8 bits", (None,))
    block = said.get("block_structure")
    if isinstance(block, str):
        block = [int(side) for side in block.lower().split("x")]
    return Scheme(
        packed=stored == "pack-quantized",
        float8=float8,
        bits=bits,
        strategy=strategy,
        group_size=said.get("group_size") or -1,
        block=tuple(block) if block and strategy == "block" else None,
        symmetric=symmetric,
        inputs="none" if not inputs else "dynamic" if inputs.get("dynamic") else "static",
    )


def read(weights: Weights, source: LinearSource) -> Projection:
    """As engines.layers.linear.Format. Raises UnsupportedModelError as `scheme`."""
    config = weights.checkpoint.quantization
    assert config is not None
    said = scheme(config)

    def part(module: StoredModule) -> QuantizedWeight:
        if said.packed:
            return _packed(weights, module, said)
        return _float8(weights, module, said) if said.float8 else _int8(weights, module, said)

    return read_projection(weights, source, part)


def _packed(weights: Weights, module: StoredModule, said: Scheme) -> GroupedIntWeight:
    (rows, inputs), name, bits = module.shape, module.name, said.bits
    group_size = said.group_size if said.strategy == "group" else module.columns.total
    groups, in_word = -(-inputs // group_size), 32 // bits
    held, by_group = module.rows.by(), module.columns.by(group_size)
    by_word = (held, module.columns.by(in_word))
    words = weights.read(f"{name}.weight_packed", (rows, -(-inputs // in_word)), torch.int32, *by_word)
    scales = weights.read(f"{name}.weight_scale", (rows, groups), torch.float32, held, by_group)
    weights.read(f"{name}.weight_shape", (2,), torch.int64)
    packed = None
    if not said.symmetric:
        by_word = (module.rows.by(in_word), by_group)
        packed = weights.read(f"{name}.weight_zero_point", (-(-rows // in_word), groups), torch.int32, *by_word)
    order = gptq.read_order(weights, f"{name}.weight_g_idx", module.columns, group_size)
    if scales.is_meta:
        return blank((rows, inputs), bits, group_size)
    codes = unpack(words, bits)[:, :inputs]
    if packed is None:
        zeros = torch.full((rows, groups), 2 ** (bits - 1), dtype=torch.int16, device=scales.device)
    else:
        zeros = unpack(packed.T.contiguous(), bits).T[:rows].to(torch.int16)
    if order is not None:
        codes = codes[:, order]
    return GroupedIntWeight(codes.contiguous(), scales, zeros, bits, group_size, order)


def _int8(weights: Weights, module: StoredModule, said: Scheme) -> Int8Weight | GroupedIntWeight:
    (rows, inputs), name, held = module.shape, module.name, module.rows.by()
    data = weights.read(f"{name}.weight", module.shape, torch.int8, held, module.columns.by())
    if said.inputs != "none":
        scales = weights.read(f"{name}.weight_scale", (rows, 1), torch.float32, held).flatten()
        return Int8Weight(data, scales, _input_scale(weights, name, said))
    group_size = said.group_size if said.strategy == "group" else module.columns.total
    here = (held, module.columns.by(group_size))
    scales = weights.read(f"{name}.weight_scale", (rows, -(-inputs // group_size)), torch.float32, *here)
    if scales.is_meta:
        return blank(module.shape, 8, group_size)
    codes = (data.to(torch.int16) + 128).to(torch.uint8)
    return GroupedIntWeight(codes, scales, torch.full_like(scales, 128, dtype=torch.int16), 8, group_size)


def _float8(weights: Weights, module: StoredModule, said: Scheme) -> Float8Weight:
    tile = {"tensor": None, "channel": (1, module.columns.total), "block": said.block}[said.strategy]
    static = f"{module.name}.input_scale" if said.inputs == "static" else None
    return fp8.read_float8(weights, module, f"{module.name}.weight_scale", tile, static)


def _input_scale(weights: Weights, name: str, said: Scheme) -> Tensor | None:
    return fp8.read_number(weights, f"{name}.input_scale") if said.inputs == "static" else None


def quantize(weight: Tensor, said: Scheme) -> dict[str, Tensor]:
    """A checkpoint's tensors for a weight [out, in], rounded to nearest, by the ends of their names."""
    if said.float8:
        block = {"tensor": None, "channel": (1, weight.shape[1]), "block": said.block}[said.strategy]
        made = fp8.quantize(weight, block)
        return {"weight": made["weight"], "weight_scale": made["weight_scale_inv"]}
    group_size = said.group_size if said.strategy == "group" else weight.shape[1]
    codes, scales, zeros = quantize_groups(weight, said.bits, group_size, said.symmetric)
    if not said.packed:
        return {"weight": (codes.int() - 128).to(torch.int8), "weight_scale": scales}
    tensors = {
        "weight_packed": pack(codes, said.bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not said.symmetric:
        tensors["weight_zero_point"] = pack(zeros.T, said.bits).T.contiguous()
    return tensors
