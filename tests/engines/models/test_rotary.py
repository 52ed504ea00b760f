"""Rotary tables against transformers' modeling_rope_utils, for every scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engines.batch import Batch
from engines.layers.rotary import RotaryEmbedding
from engines.models.spec import rope_spec

HEAD_DIM = 32
FACTORS = [1.0 + 0.3 * i for i in range(HEAD_DIM // 2)]
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 96,
    },
    {
        "rope_type": "longrope",
        "short_factor": FACTORS,
        "long_factor": [2 * f for f in FACTORS],
        "original_max_position_embeddings": 128,
    },
    {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": FACTORS,
        "long_factor": [3 * f for f in FACTORS],
        "original_max_position_embeddings": 128,
    },
]


def one_text(length: int, keys: int) -> Batch:
    lengths = torch.tensor([length], dtype=torch.int32)
    starts = torch.tensor([0, length], dtype=torch.int32)
    tokens = torch.arange(length)
    return Batch(tokens, tokens, starts, lengths, length, length, context_keys=torch.tensor([keys]))


@pytest.mark.parametrize("length", [40, 200, 300])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "-".join(map(str, list(s.values())[:2])))
def test_angles_of_a_text(scaling: dict[str, Any], length: int) -> None:
    """256 is the model's own length; a prompt of each size is given at once."""
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 5000.0, **scaling},
    )
    read = {"max_position_embeddings": 256, "rope_theta": 5000.0, "rope_scaling": scaling}
    spec = rope_spec(read, HEAD_DIM)
    assert spec == rope_spec({"max_position_embeddings": 256, "rope_parameters": config.rope_parameters}, HEAD_DIM)
    rope = RotaryEmbedding(spec, HEAD_DIM, 256, 320, torch.float32, torch.device("cpu"))
    rotation = rope.rotation(one_text(length, rope.context_key(length, length)))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    half = HEAD_DIM // 2
    found = rotation.cos_sin[rotation.positions]
    want = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)
    torch.testing.assert_close(found, want, rtol=0, atol=2e-5 if spec.kind == "dynamic" else 0.0)


def test_context_keys() -> None:
    """dynamic: the prompt's length once it is beyond the model's own; longrope: whether the text is long by now."""
    scalings = {s["rope_type"]: s for s in SCALINGS}

    def keys(kind: str, max_length: int) -> list[int]:
        spec = rope_spec({"max_position_embeddings": 256, "rope_scaling": scalings[kind]}, HEAD_DIM)
        rope = RotaryEmbedding(spec, HEAD_DIM, 256, max_length, torch.float32, torch.device("cpu"))
        return [rope.context_key(prompt, total) for prompt, total in ((100, 128), (100, 129), (256, 300), (257, 257))]

    assert keys("default", 320) == keys("llama3", 320) == keys("yarn", 320) == [0, 0, 0, 0]
    assert keys("dynamic", 320) == [0, 0, 0, 257]
    assert keys("dynamic", 256) == [0, 0, 0, 0]
    assert keys("longrope", 320) == [0, 1, 1, 1]
    assert keys("longrope", 128) == [0, 0, 0, 0]


def test_dynamic_angles_do_not_depend_on_the_batch() -> None:
    """A token beyond the model's own length has angles for the length at its own moment."""
    spec = rope_spec({"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, HEAD_DIM)
    rope = RotaryEmbedding(spec, HEAD_DIM, 16, 64, torch.float32, torch.device("cpu"))
    positions = torch.tensor([3, 20, 30])
    starts = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    together = rope.rotation(Batch(positions, positions, starts, (positions + 1).int(), 1, 31))
    for i, position in enumerate(positions):
        alone = Batch(position[None], position[None], starts[:2], (position[None] + 1).int(), 1, int(position) + 1)
        rotation = rope.rotation(alone)
        torch.testing.assert_close(
            rotation.cos_sin[rotation.positions][0], together.cos_sin[together.positions][i], rtol=0, atol=0
        )
