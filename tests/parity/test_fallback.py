"""Models without a family: through transformers' classes, routed or with their own cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.api import CheckpointError, UnsupportedModelError
from engines.models.load import load_model
from engines.ops import OpSet
from tests.parity.checkpoints import make_checkpoint
from tests.parity.fallback import CONFIGS
from tests.parity.ragged import Driver, settings
from tests.parity.test_logits import expected_logits, prompts

ROUTED = {"gpt2", "gpt_neox", "gpt_oss", "cohere", "opt"}
LENGTHS = (1, 60, 16, 121)


@pytest.fixture(scope="module", params=CONFIGS)
def fallback(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, make_checkpoint(CONFIGS[request.param], folder)


def test_logits_with_chunks_and_decode(fallback: Any) -> None:
    """Chunks of 29 tokens, the last 4 tokens one by one, several sequences in each batch."""
    name, folder, reference = fallback
    ops = OpSet()
    model = load_model(settings(folder, implementation="transformers", max_model_len=400), ops)
    assert model.paged == (name in ROUTED), model.reason
    tokens = prompts(CONFIGS[name]["vocab_size"], LENGTHS)
    expected = expected_logits(reference, tokens)
    driver = Driver(model, ops, torch.float32, LENGTHS)
    compared = 0
    while any(done < length for done, length in zip(driver.done, LENGTHS, strict=True)):
        pieces = {}
        for i, ids in enumerate(tokens):
            left = len(ids) - driver.done[i]
            if left:
                pieces[i] = ids[driver.done[i] :][: min(29, left - 4) if left > 4 else 1]
        ends = torch.tensor([len(piece) for piece in pieces.values()]).cumsum(0) - 1
        complete = [k for k, (i, p) in enumerate(pieces.items()) if driver.done[i] + len(p) > len(tokens[i]) - 5]
        if not complete:
            driver.run(pieces, ends[:0])
            continue
        with torch.inference_mode():
            found = model.logits(driver.run(pieces, ends[complete]))
        want = torch.stack([expected[list(pieces)[k]][driver.done[list(pieces)[k]] - 1] for k in complete])
        torch.testing.assert_close(found, want, rtol=2e-4, atol=2e-4)
        compared += len(complete)
    assert compared > len(LENGTHS) * 3


def test_all_hidden_states_at_once(fallback: Any) -> None:
    """As scoring asks for them, in two pieces; released sequences may be computed again."""
    name, folder, reference = fallback
    ops = OpSet()
    model = load_model(settings(folder, implementation="transformers", max_model_len=400), ops)
    tokens = prompts(CONFIGS[name]["vocab_size"], (40, 9), seed=3)
    for _ in range(2):
        driver = Driver(model, ops, torch.float32, (40, 9))
        with torch.inference_mode():
            first = model.logits(driver.run({0: tokens[0][:25], 1: tokens[1]}))
            second = model.logits(driver.run({0: tokens[0][25:]}))
        expected = expected_logits(reference, tokens)
        torch.testing.assert_close(first[25:], expected[1], rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(torch.cat((first[:25], second)), expected[0], rtol=2e-4, atol=2e-4)
        for seq_id in range(2):
            model.release(seq_id)


def test_a_model_is_not_routed_where_that_would_change_it(tmp_path: Path) -> None:
    """dynamic ropes look at the longest text of a batch: such a model keeps its own cache."""
    config = {**CONFIGS["gpt_neox"], "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    make_checkpoint(config, tmp_path)
    model = load_model(settings(tmp_path, implementation="transformers"), OpSet())
    assert not model.paged
    assert "rotary" in model.reason


def test_a_sequence_that_is_not_held_is_an_error(tmp_path: Path) -> None:
    make_checkpoint(CONFIGS["mamba"], tmp_path)
    model = load_model(settings(tmp_path, implementation="transformers"), OpSet())
    driver = Driver(model, OpSet(), torch.float32, (9,))
    driver.run({0: torch.arange(4)})
    model.release(0)
    with pytest.raises(RuntimeError, match="sequence 0: continues at token 4 but nothing of it is held"):
        driver.run({0: torch.arange(2)})


def test_a_model_that_keeps_its_state_to_itself_is_refused(tmp_path: Path) -> None:
    config = {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "lru_width": 32,
        "attention_window_size": 16,
    }
    make_checkpoint(config, tmp_path)
    with pytest.raises(UnsupportedModelError, match="RecurrentGemmaForCausalLM returns no cache that could be kept"):
        load_model(settings(tmp_path, implementation="transformers"), OpSet())


def test_classification_is_refused(tmp_path: Path) -> None:
    make_checkpoint(CONFIGS["gpt2"], tmp_path)
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel cannot classify here"):
        load_model(settings(tmp_path, implementation="transformers", kind="classify"), OpSet())


def test_missing_tensors_are_not_made_up(tmp_path: Path) -> None:
    """transformers would fill them with random numbers."""
    make_checkpoint(CONFIGS["gpt_neox"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["gpt_neox.extra"] = tensors.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.bias")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        load_model(settings(tmp_path, implementation="transformers"), OpSet())
    assert "missing: gpt_neox.layers.1.mlp.dense_h_to_4h.bias" in str(error.value)
    assert "unexpected: gpt_neox.extra" in str(error.value)


def test_not_a_causal_model(tmp_path: Path) -> None:
    make_checkpoint(CONFIGS["gpt2"], tmp_path)
    config = {"architectures": ["NovelForCausalLM"], "model_type": "novel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="transformers cannot load NovelForCausalLM"):
        load_model(settings(tmp_path, implementation="transformers"), OpSet())
