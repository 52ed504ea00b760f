"""Experts in quantized formats, against plain checkpoints of what their tensors mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines import discover
from engines.api import UnsupportedModelError
from engines.formats import mxfp4
from engines.models.load import load_model
from engines.ops import OpSet
from tests.engines.formats import specification
from tests.engines.formats.checkpoints import VARIANTS, Variant, numpy_of
from tests.engines.formats.test_formats import logits
from tests.parity.checkpoints import make_checkpoint
from tests.parity.ragged import settings

FAMILIES = discover.families()
BLOCK = next(v for v in VARIANTS if v.name == "fp8-(32, 64)")


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("gpt_oss")
    config = FAMILIES["gpt_oss"].tiny_config()
    make_checkpoint(config, folder)
    return config, load_file(folder / "model.safetensors")


def test_gpt_oss_in_mxfp4(gpt_oss: Any, tmp_path: Path) -> None:
    config, plain = gpt_oss
    packed, meant = dict(plain), dict(plain)
    for name, tensor in plain.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made = mxfp4.quantize(tensor.transpose(1, 2))
            del packed[name]
            packed |= {f"{name}_blocks": made["blocks"], f"{name}_scales": made["scales"]}
            pairs = zip(made["blocks"].numpy(), made["scales"].numpy(), strict=True)
            weights = [torch.from_numpy(specification.mxfp4(*pair)).float().T for pair in pairs]
            meant[name] = torch.stack(weights)
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    found = logits(write(tmp_path / "packed", {**config, "quantization_config": method}, packed))
    expected = logits(write(tmp_path / "meant", config, meant))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(write(tmp_path / "plain", config, plain))).abs().max() > 0.01


def test_experts_in_one_tensor_in_another_format_are_refused(gpt_oss: Any, tmp_path: Path) -> None:
    config, plain = gpt_oss
    folder = write(tmp_path / "awq", {**config, "quantization_config": VARIANTS[0].config}, plain)
    with pytest.raises(UnsupportedModelError, match="experts of GptOssForCausalLM lie in one tensor"):
        load_model(settings(folder), OpSet())


@pytest.mark.parametrize("variant", [VARIANTS[0], next(v for v in VARIANTS if "act" in v.name), BLOCK], ids=str)
def test_experts_that_are_modules(variant: Variant, tmp_path: Path) -> None:
    config = {
        **FAMILIES["qwen3_moe"].tiny_config(), "moe_intermediate_size": 64, "num_hidden_layers": 1,
        "mlp_only_layers": [], "num_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    make_checkpoint(config, tmp_path / "source")
    plain = load_file(tmp_path / "source" / "model.safetensors")
    packed, meant = dict(plain), dict(plain)
    for name, tensor in plain.items():
        if ".experts." in name:
            stored = variant.quantize(tensor)
            del packed[name]
            packed |= {name.removesuffix("weight") + end: part for end, part in stored.items()}
            meant[name] = torch.from_numpy(variant.meaning(numpy_of(stored))).float()
    found = logits(write(tmp_path / "packed", {**config, "quantization_config": variant.config}, packed))
    torch.testing.assert_close(found, logits(write(tmp_path / "meant", config, meant)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2"])
def test_latent_attention_with_quantized_projections(name: str, tmp_path: Path) -> None:
    """Rows of rotating features change places, and kv_b_proj is absorbed: both work on packed weights too."""
    config = FAMILIES[name].tiny_config()
    make_checkpoint(config, tmp_path / "source")
    plain = load_file(tmp_path / "source" / "model.safetensors")
    packed, meant = dict(plain), dict(plain)
    for tensor_name, tensor in plain.items():
        if "_proj" in tensor_name and tensor.ndim == 2:
            stored = BLOCK.quantize(tensor)
            del packed[tensor_name]
            packed |= {tensor_name.removesuffix("weight") + end: part for end, part in stored.items()}
            meant[tensor_name] = torch.from_numpy(BLOCK.meaning(numpy_of(stored))).float()
    found = logits(write(tmp_path / "packed", {**config, "quantization_config": BLOCK.config}, packed))
    torch.testing.assert_close(found, logits(write(tmp_path / "meant", config, meant)), rtol=1e-4, atol=1e-4)
