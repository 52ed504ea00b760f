"""Every family of decoders on the CUDA op set, emulated: logits of ragged batches, prefilled and decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import discover
from engines.cuda.opset import OpSet
from engines.models.load import load_model
from engines.models.spec import DecoderSpec
from engines.ops import OpSet as Reference
from tests.parity.checkpoints import make_checkpoint
from tests.parity.ragged import Driver, settings

FAMILIES = discover.families()
DECODERS = [n for n, f in FAMILIES.items() if isinstance(f.spec(f.tiny_config()), DecoderSpec)]
LENGTHS = (1, 16, 75, 2, 130, 33)
HEAD_DIM = 16


def sized(config: dict[str, Any], head_dim: int = HEAD_DIM) -> dict[str, Any]:
    """A tiny config with heads of a size that kernels are compiled for."""
    if "kv_lora_rank" in config:
        config = {**config, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    if "head_dim" in config:
        return {**config, "head_dim": head_dim}
    resized = {**config, "hidden_size": head_dim * config["num_attention_heads"]}
    for key in ("rope_parameters", "rope_scaling"):
        rope = resized.get(key)
        if rope and "short_factor" in rope:  # one for each pair of dimensions that rotate
            pairs = int(head_dim * resized.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1))) // 2
            resized[key] = {**rope, **{f"{n}_factor": rope[f"{n}_factor"][:pairs] for n in ("short", "long")}}
    return resized


def logits(folder: Path, ops: Reference, dtype: torch.dtype, tokens: list[Tensor]) -> Tensor:
    """Of every token: the prompts but for their last token in one step, then a step that decodes."""
    model = load_model(settings(folder, max_model_len=400, dtype=str(dtype).removeprefix("torch.")), ops)
    driver = Driver(model, ops, dtype, LENGTHS)
    with torch.inference_mode():
        first = driver.run({i: ids[:-1] for i, ids in enumerate(tokens) if len(ids) > 1})
        last = driver.run({i: ids[-1:] for i, ids in enumerate(tokens)})
        return model.logits(torch.cat((first, last))).float()


@pytest.mark.parametrize("family", DECODERS)
def test_logits_are_as_exact_as_the_reference_ops(ops: OpSet, family: str, tmp_path: Path) -> None:
    """Against float32: at most twice the error of plain torch in bfloat16, on average and at worst."""
    config = sized(FAMILIES[family].tiny_config())
    make_checkpoint(config, tmp_path)
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, config["vocab_size"], (n,), generator=generator) for n in LENGTHS]
    exact = logits(tmp_path, Reference(), torch.float32, tokens)
    plain = (logits(tmp_path, Reference(), torch.bfloat16, tokens) - exact).abs()
    found = (logits(tmp_path, ops, torch.bfloat16, tokens) - exact).abs()
    assert plain.max() > 0
    assert found.mean() <= 1.2 * plain.mean()
    assert found.max() <= 2 * plain.max()
