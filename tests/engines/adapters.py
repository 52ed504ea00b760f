"""LoRA adapters as PEFT writes them, and the checkpoints in which they are merged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "base_model.model."


def write_adapter(
    folder: Path, weights: dict[str, Tensor], modules: list[str], rank: int, seed: int, **changes: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Files of an adapter of the modules (weights' names without .weight); returns A and B of each."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for module in modules:
        out, size = weights[f"{module}.weight"].shape
        made[module] = torch.randn(rank, size, generator=generator) * 0.2, torch.randn(out, rank, generator=generator)
    folder.mkdir()
    tensors = {f"{PREFIX}{m}.lora_{x}.weight": t for m, pair in made.items() for x, t in zip("AB", pair, strict=True)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 6, "use_rslora": False, "bias": "none", "use_dora": False,
        "target_modules": sorted({m.rpartition(".")[2] for m in modules}), "fan_in_fan_out": False,
        "modules_to_save": None, "init_lora_weights": True, "alpha_pattern": {}, "rank_pattern": {}, **changes,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return made


def merge(source: Path, folder: Path, made: dict[str, tuple[Tensor, Tensor]], scale: dict[str, float] | float) -> Path:
    """The checkpoint with W + scale * B @ A in place of W, by LoRA's definition (arXiv 2106.09685 section 4.1)."""
    weights = load_file(source / "model.safetensors")
    for module, (a, b) in made.items():
        factor = scale if isinstance(scale, float) else scale[module]
        weights[f"{module}.weight"] += (factor * b.double() @ a.double()).float()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def scale_of(rank: int, alpha: float = 6, rank_stabilized: bool = False) -> float:
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)
