"""8-bit floats (E4M3) as DeepSeek V3 and Qwen 3 store them, and as AutoFP8 does.

    weight            [out_features, in_features] float8_e4m3fn
    weight_scale_inv  with weight_block_size [r, c]: [ceil(out / r), ceil(in / c)] float32; else one number
    weight_scale      the same under AutoFP8's name
    input_scale       one number, with activation_scheme `static` (activation_scale in newer files)

weight = float8 * scale, whatever the name says. Source: arXiv 2412.19437 section 3.3 and inference/kernel.py
(weight_dequant) of github.com/deepseek-ai/DeepSeek-V3; github.com/neuralmagic/AutoFP8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.formats._common import expect, read_projection
from engines.ops.moe import Projection
from engines.ops.quantized import Float8Weight
from engines.weights import LinearSource, StoredModule, Weights

IGNORED = (r".*\.(k|v|kv)_scale",)
"""Scales for a KV cache in 8 bits; the cache here has its own for each token."""
MAXIMUM = 448.0
"""Largest number of float8_e4m3fn."""


def detect(quantization: dict[str, Any] | None) -> bool:
    return quantization is not None and quantization.get("quant_method") == "fp8"


def read(weights: Weights, source: LinearSource) -> Projection:
    """As engines.layers.linear.Format. Raises UnsupportedModelError for other 8-bit floats than E4M3."""
    config = weights.checkpoint.quantization
    assert config is not None
    expect(config, "fmt", config.get("fmt", "e4m3"), ("e4m3", "float8_e4m3fn"))
    scheme = expect(config, "activation_scheme", config.get("activation_scheme", "dynamic"), ("dynamic", "static"))
    block = config.get("weight_block_size")

    def part(module: StoredModule) -> Float8Weight:
        name = module.name
        suffix = "weight_scale" if weights.stored(f"{name}.weight_scale") else "weight_scale_inv"
        inputs = ("input_scale", "activation_scale")
        calibrated = next((f"{name}.{end}" for end in inputs if weights.stored(f"{name}.{end}")), f"{name}.input_scale")
        return read_float8(
            weights,
            module,
            f"{name}.{suffix}",
            tuple(block) if block else None,
            calibrated if scheme == "static" else None,
        )

    return read_projection(weights, source, part)


def read_float8(
    weights: Weights,
    module: StoredModule,
    scale: str,
    tile: tuple[int, int] | None,
    input_scale: str | None,
) -> Float8Weight:
    """scale, input_scale: stored names. tile None: one scale for all."""
    shape, rows, columns = module.shape, module.rows, module.columns
    data = weights.read(f"{module.name}.weight", shape, torch.float8_e4m3fn, rows.by(), columns.by())
    static = None if input_scale is None else read_number(weights, input_scale)
    if tile is None:
        scales = read_number(weights, scale).expand(shape[0], 1).contiguous()
        return Float8Weight(data, scales, (1, shape[1]), static)
    held = rows.by(tile[0]), columns.by(tile[1])
    tile = (min(tile[0], shape[0]), min(tile[1], shape[1]))
    grid = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    return Float8Weight(data, weights.read(scale, grid, torch.float32, *held), tile, static)


def read_number(weights: Weights, name: str) -> Tensor:
    """[] float32, from a tensor of one element in any number of dimensions."""
    info = weights.checkpoint.tensors.get(name)
    shape = info.shape if info is not None and set(info.shape) <= {1} else ()
    return weights.read(name, shape, torch.float32).reshape(())


def quantize(weight: Tensor, block: tuple[int, int] | None) -> dict[str, Tensor]:
    """A checkpoint's tensors for a weight [out, in], rounded to nearest, by the ends of their names."""
    rows, columns = weight.shape
    tile = block or (rows, columns)
    grid = (-(-rows // tile[0]), -(-columns // tile[1]))
    padded = torch.nn.functional.pad(weight.float(), (0, grid[1] * tile[1] - columns, 0, grid[0] * tile[0] - rows))
    tiles = padded.view(grid[0], tile[0], grid[1], tile[1])
    scales = (tiles.abs().amax((1, 3)) / MAXIMUM).clamp(min=1e-12)
    data = (tiles / scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn)
    return {"weight": data, "weight_scale_inv": scales if block else scales.reshape(())}
