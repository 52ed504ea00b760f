"""Keys and values in 8 or 4 bits: how far they are from what was written, and what a model makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engines import costs, discover
from engines.api import EngineConfig, EngineSettings, Request, SamplingParams, UnsupportedModelError
from engines.load import load_engine
from engines.ops import OpSet, attention
from engines.ops.kv_cache import dequantize_vectors, quantize_vectors
from tests import attention_cases
from tests.cases import cases
from tests.parity.checkpoints import make_checkpoint

LLAMA = discover.families()["llama"].tiny_config()


@pytest.mark.parametrize("kv_dtype, steps", [("int8", 255), ("int4", 15), ("fp8", None)])
def test_a_number_is_off_by_half_a_step_at_most(kv_dtype: Any, steps: int | None) -> None:
    x = torch.randn(200, 3, 33, generator=torch.Generator().manual_seed(1)) * 5 + 2
    codes, scales = quantize_vectors(x, kv_dtype)
    back = dequantize_vectors(codes, scales.double(), kv_dtype, 33, torch.float64)
    if steps:
        allowed = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)).double() / steps * 0.5
    else:
        allowed = x.abs().double() / 16 + x.abs().amax(-1, keepdim=True) / 448 * 2.0**-10
    assert ((back - x).abs() <= allowed * 1.0001).all()
    constant = torch.full((1, 1, 8), -3.0)
    codes, scales = quantize_vectors(constant, kv_dtype)
    torch.testing.assert_close(dequantize_vectors(codes, scales, kv_dtype, 8, torch.float32), constant)


def test_bytes_are_those_that_plans_count() -> None:
    ops = OpSet()
    for kv_dtype, size in (("int8", 72), ("int4", 40), ("fp8", 68)):
        cache = ops.allocate_quantized_kv_cache(3, 16, 2, 64, kv_dtype, torch.device("cpu"))
        held = sum(t.numel() * t.itemsize for t in (cache.k, cache.v, cache.k_scales, cache.v_scales))
        assert held == 3 * 16 * 2 * 2 * size == 3 * 16 * 2 * 2 * costs.kv_vector_bytes(64, "bfloat16", kv_dtype)
    assert costs.kv_vector_bytes(64, "bfloat16", "auto") == 128


def test_runs_of_sequences_do_not_change_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked some sequences at a time, or all at once."""
    case = next(c for c in cases() if str(c) == "quantized_attention-int8 shared prefix")
    arguments = case.arguments(torch.float64)
    whole = OpSet().quantized_attention(*arguments, **case.options)
    monkeypatch.setattr(attention, "MAX_UNPACKED_TOKENS", 400)
    runs = list(attention._runs([200, 193, 230, 257, 300, 199, 210]))
    assert runs == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
    torch.testing.assert_close(OpSet().quantized_attention(*arguments, **case.options), whole, rtol=1e-12, atol=1e-12)


def test_sequences_without_new_tokens_are_passed_over() -> None:
    given = attention_cases.make(attention_cases.Case("none", lens=(5,), new=(0,)), torch.float32)
    codes, scales = quantize_vectors(given.cache.k, "int8")
    cache = attention.QuantizedKVCache("int8", 64, codes, codes, scales, scales)
    assert OpSet().quantized_attention(given.q, cache, given.batch, 1.0).shape == (0, 9, 64)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint(LLAMA, folder)
    return folder


def scores(folder: Path, kv_dtype: str, **changes: Any) -> tuple[torch.Tensor, Any]:
    """Log-probabilities of 40 tokens of each of 6 texts, computed in small chunks so that most come from the cache."""
    config = EngineConfig(kv_dtype=kv_dtype, block_size=8, max_num_batched_tokens=24, kv_cache_bytes=1 << 20, **changes)
    engine = load_engine(EngineSettings("cpu", str(folder), "float32", config, kind="score"))
    generator = torch.Generator().manual_seed(3)
    texts = torch.randint(0, LLAMA["vocab_size"], (6, 60), generator=generator).tolist()
    engine.submit([Request(i, "score", text, score_from=20) for i, text in enumerate(texts)])
    outcomes = {}
    while engine.num_unfinished:
        outcomes |= {outcome.request_id: outcome for outcome in engine.step()}
    assert not [o.error for o in outcomes.values() if o.error]
    stats = engine.stats()
    engine.close()
    return torch.tensor([list(outcomes[i].values) for i in range(6)]), stats


def test_a_model_stays_close_to_its_full_precision(llama: Path) -> None:
    exact, plain = scores(llama, "auto")
    errors = {}
    for kv_dtype in ("int8", "fp8", "int4"):
        found, stats = scores(llama, kv_dtype)
        errors[kv_dtype] = float((found - exact).abs().mean())
        assert stats.num_blocks > plain.num_blocks
    # A step of int8 is a 17th of int4's; fp8 has 3 bits of mantissa, a step of a 16th of a number.
    assert 0 < errors["int8"] < errors["fp8"] < errors["int4"]
    assert 8 < errors["int4"] / errors["int8"] < 34, errors
    assert errors["int8"] < 0.03 * float(exact.std())


def test_generation_with_shared_prefixes(llama: Path) -> None:
    config = EngineConfig(kv_dtype="int8", block_size=8, kv_cache_bytes=200_000, max_num_seqs=8)
    engine = load_engine(EngineSettings("cpu", str(llama), "float32", config))
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    prompts = [[*range(40), i] for i in range(12)]
    engine.submit([Request(i, "generate", prompt, sampling) for i, prompt in enumerate(prompts)])
    outcomes = []
    while engine.num_unfinished:
        outcomes += engine.step()
    assert all(outcome.error is None and len(outcome.token_ids) == 20 for outcome in outcomes)
    assert engine.stats().num_cached_tokens > 0
    engine.check_integrity()


def test_latent_caches_stay_as_they_are(tmp_path: Path) -> None:
    config = discover.families()["deepseek_v2"].tiny_config()
    make_checkpoint(config, tmp_path)
    settings = EngineSettings("cpu", str(tmp_path), "float32", EngineConfig(kv_dtype="int8"))
    with pytest.raises(UnsupportedModelError, match="kv_dtype: int8; expected auto for latent attention"):
        load_engine(settings)
