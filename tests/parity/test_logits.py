"""Logits of every family against transformers' class, over ragged batches and chunked prefill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import discover
from engines.models.load import load_model
from engines.models.spec import DecoderSpec
from engines.ops import OpSet
from tests.parity.checkpoints import make_checkpoint
from tests.parity.ragged import Driver, settings

FAMILIES = discover.families()
DECODERS = [n for n, f in FAMILIES.items() if isinstance(f.spec(f.tiny_config()), DecoderSpec)]
LENGTHS = (1, 16, 75, 2, 300, 33)


def prompts(vocab: int, lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator) for n in lengths]


def expected_logits(reference: Any, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [fresh(reference)(ids[None]).logits[0].float() for ids in tokens]


def fresh(reference: Any) -> Any:
    """The model without what dynamic ropes remember of earlier texts."""
    rotary = getattr(reference.base_model, "rotary_emb", None)
    if rotary is not None:
        reference.base_model.rotary_emb = type(rotary)(reference.config)
    return reference


@pytest.fixture(scope="module", params=DECODERS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, reference model, tiny config) of a family; float32."""
    config = FAMILIES[request.param].tiny_config()
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make_checkpoint(config, folder), config


def test_ragged_batch(family: Any) -> None:
    folder, reference, config = family
    ops = OpSet()
    model = load_model(settings(folder, max_model_len=400), ops)
    tokens = prompts(config["vocab_size"])
    hidden = Driver(model, ops, torch.float32, LENGTHS).run(dict(enumerate(tokens)))
    with torch.inference_mode():
        found = model.logits(hidden)
    torch.testing.assert_close(found, torch.cat(expected_logits(reference, tokens)), rtol=1e-4, atol=1e-4)


def test_chunked_prefill_with_outputs(family: Any) -> None:
    """Prompts in chunks of 23 beside others that are complete; only the last token of each piece is asked for."""
    folder, reference, config = family
    ops = OpSet()
    model = load_model(settings(folder, max_model_len=400), ops)
    tokens = prompts(config["vocab_size"], seed=2)
    driver = Driver(model, ops, torch.float32, LENGTHS)
    keys = [model.context_key(length, length) for length in LENGTHS]
    expected = expected_logits(reference, tokens)
    while any(done < length for done, length in zip(driver.done, LENGTHS, strict=True)):
        pieces = {i: ids[driver.done[i] :][:23] for i, ids in enumerate(tokens) if driver.done[i] < len(ids)}
        last = torch.tensor([len(piece) for piece in pieces.values()]).cumsum(0) - 1
        with torch.inference_mode():
            found = model.logits(driver.run(pieces, last, keys))
        want = torch.stack([expected[i][driver.done[i] - 1] for i in pieces])
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_config_as_transformers_saves_it_means_the_same(family: Any) -> None:
    folder, _, config = family
    module = discover.family(config["architectures"][0])
    assert module is not None
    saved = json.loads((folder / "saved_config.json").read_text())
    if config["model_type"].startswith("internlm"):
        saved = {**config, **{k: v for k, v in saved.items() if k in ("rope_parameters", "head_dim")}}
    assert saved.get("rope_parameters") and module.spec(saved) == module.spec(config)


def test_bfloat16_error_is_bounded(family: Any, tmp_path: Path) -> None:
    """At most twice the error that transformers' own bfloat16 forward has against float32, by root mean square."""
    _, _, config = family
    low = make_checkpoint(config, tmp_path, torch.bfloat16)
    ops = OpSet()
    model = load_model(settings(tmp_path, "bfloat16"), ops)
    tokens = prompts(config["vocab_size"], (40, 17, 90))
    hidden = Driver(model, ops, torch.bfloat16, (40, 17, 90)).run(dict(enumerate(tokens)))
    with torch.inference_mode():
        found = model.logits(hidden)
    theirs = torch.cat(expected_logits(low, tokens))
    exact = torch.cat(expected_logits(low.float(), tokens))
    assert (found - exact).pow(2).mean() <= 4 * (theirs - exact).pow(2).mean()
