"""Tiny checkpoints in every weight format, and the plain ones that mean the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from engines.formats import awq, compressed_tensors, fp8, gptq
from engines.formats.compressed_tensors import Scheme
from tests.engines.formats import specification

HIDDEN, INNER, VOCAB = 128, 192, 64
SIZES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Variant:
    """One way to store a linear layer."""

    name: str
    config: dict[str, Any]
    """quantization_config"""
    quantize: Callable[[Tensor], dict[str, Tensor]]
    meaning: Callable[[dict[str, np.ndarray]], np.ndarray]

    def __str__(self) -> str:
        return self.name


def numpy_of(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t).numpy() for name, t in tensors.items()}


def order_of(size: int) -> Tensor:
    """A shuffle that is the same for all layers of one input."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))


def _awq(group_size: int) -> Variant:
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    return Variant(
        f"awq-{group_size}",
        config,
        lambda w: awq.quantize(w, w.shape[1] if group_size == -1 else group_size),
        lambda t: specification.awq(t, t["qweight"].shape[0] if group_size == -1 else group_size),
    )


def _gptq(bits: int, group_size: int, symmetric: bool, act_order: bool, version: str = "gptq") -> Variant:
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": act_order,
        "checkpoint_format": version,
    }  # fmt: skip

    def quantize(w: Tensor) -> dict[str, Tensor]:
        size = w.shape[1] if group_size == -1 else group_size
        made = gptq.quantize(w, bits, size, symmetric, order_of(w.shape[1]) if act_order else None)
        if version == "gptq_v2":
            fields = gptq.unpack(made["qzeros"], bits).int() + 1
            made["qzeros"] = gptq.pack(fields, bits)
        return made

    name = f"gptq-{bits}-{group_size}{'-sym' if symmetric else ''}{'-act' if act_order else ''}-{version}"
    return Variant(name, config, quantize, lambda t: specification.gptq(t, bits, 1 if version == "gptq" else 0))


def _fp8(block: tuple[int, int] | None) -> Variant:
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if block:
        config["weight_block_size"] = list(block)

    def meaning(t: dict[str, np.ndarray]) -> np.ndarray:
        shape = t["weight"].shape
        return specification.float8(t["weight"], t["weight_scale_inv"].reshape(-1, 1) if not block else
                                    t["weight_scale_inv"], block or shape)  # fmt: skip

    return Variant(f"fp8-{block}", config, lambda w: fp8.quantize(w, block), meaning)


def _compressed(stored: str, **said: Any) -> Variant:
    inputs = {"num_bits": 8, "type": said["type"], "strategy": "token", "dynamic": True, "symmetric": True}
    with_inputs = said.pop("inputs", False)
    group = {"targets": ["Linear"], "weights": said, "input_activations": inputs if with_inputs else None}
    config = {
        "quant_method": "compressed-tensors", "format": stored, "ignore": ["lm_head"], "config_groups": {"g": group},
    }  # fmt: skip
    made: Scheme = compressed_tensors.scheme(config)

    def meaning(t: dict[str, np.ndarray]) -> np.ndarray:
        if made.packed:
            inner = int(t["weight_shape"][1])
            return specification.pack_quantized(t, made.bits, inner if made.group_size == -1 else made.group_size)
        if made.float8:
            return specification.float8(t["weight"], np.atleast_2d(t["weight_scale"]), made.block or (1, 1 << 30))
        scale = t["weight_scale"].astype(np.float64)
        return t["weight"].astype(np.float64) * scale.repeat(t["weight"].shape[1] // scale.shape[1], 1)

    name = f"{stored}-{said['num_bits']}-{said['strategy']}{'' if said.get('symmetric', True) else '-asym'}"
    return Variant(name + ("-inputs" if with_inputs else ""), config,
                   lambda w: compressed_tensors.quantize(w, made), meaning)  # fmt: skip


VARIANTS = [
    *(_awq(size) for size in (32, 64, -1)),
    _gptq(4, 32, symmetric=True, act_order=False),
    _gptq(4, 64, symmetric=False, act_order=True),
    _gptq(4, -1, symmetric=True, act_order=False),
    _gptq(8, 32, symmetric=True, act_order=True),
    _gptq(2, 32, symmetric=False, act_order=False, version="gptq_v2"),
    _fp8(None),
    _fp8((32, 64)),
    _fp8((128, 128)),
    _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
    _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=64, symmetric=False),
    _compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    _compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    _compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True, inputs=True),
    _compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True, inputs=True),
    _compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
]


def write(variant: Variant, folder: Path) -> tuple[Path, Path, dict[str, Tensor]]:
    """(quantized checkpoint, a plain float32 one with the weights that its tensors mean, the stored tensors)."""
    generator = torch.Generator().manual_seed(7)
    shared = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": torch.randn(VOCAB, HIDDEN, generator=generator) * 0.2,
        "model.layers.0.input_layernorm.weight": torch.ones(HIDDEN),
        "model.layers.0.post_attention_layernorm.weight": torch.ones(HIDDEN),
    }
    packed, plain = dict(shared), dict(shared)
    for module, size in SIZES.items():
        name = f"model.layers.0.{module}"
        stored = variant.quantize(torch.randn(size, generator=generator) * 0.2)
        packed.update({f"{name}.{end}": tensor.contiguous() for end, tensor in stored.items()})
        plain[f"{name}.weight"] = torch.from_numpy(variant.meaning(numpy_of(stored))).float()
    folders = folder / "quantized", folder / "plain"
    configs = {**LLAMA, "quantization_config": variant.config}, LLAMA
    for where, tensors, config in zip(folders, (packed, plain), configs, strict=True):
        where.mkdir()
        save_file(tensors, where / "model.safetensors")
        (where / "config.json").write_text(json.dumps(config))
    return *folders, packed
