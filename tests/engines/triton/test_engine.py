"""The whole engine on Triton's kernels, under the interpreter: what the CPU engine gives, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines import discover
from engines.api import EngineConfig, EngineSettings, Outcome, Request, SamplingParams
from engines.capability import AT_LOAD
from engines.formats import mxfp4
from engines.load import load_engine
from engines.models.spec import DecoderSpec
from engines.ops import OpSet
from tests.engines.adapters import write_adapter
from tests.engines.formats.checkpoints import VARIANTS, Variant, write
from tests.parity.checkpoints import make_checkpoint
from tests.parity.fallback import CONFIGS

LENGTHS = (5, 19, 1)
NUM_TOKENS = 4
FAMILIES = discover.families()
FAST = ("llama", "gemma2", "bert")
"""Plain, with windows and soft caps, and an encoder; the others take minutes together."""
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES]


def run(
    folder: Path,
    backend: str,
    decoder: bool,
    sampling: SamplingParams,
    implementation: Any = "native",
    quantization: str | None = None,
    kv_dtype: Any = "auto",
    adapters: dict[str, str] | None = None,
) -> list[Outcome]:
    """Outcomes in order. Prompts are cut into pieces, and the first two begin alike. Each has the next of the adapters,
    and then none.
    """
    config = EngineConfig(
        max_model_len=64, block_size=8, max_num_batched_tokens=16 if decoder else 64, kv_cache_bytes=1 << 20,
        kv_dtype=kv_dtype,
    )  # fmt: skip
    names = [*(adapters or {}), *[None] * len(LENGTHS)]
    kind: Any = "generate" if decoder else "embed"
    settings = EngineSettings(
        backend, str(folder), "float32", config, kind, pooling=None if decoder else "mean",
        implementation=implementation, quantization=quantization, adapters=adapters or {},
    )  # fmt: skip
    engine = load_engine(settings)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(5, 60, (max(LENGTHS),), generator=generator).tolist()
    engine.submit(
        [
            Request(
                i,
                kind,
                [*tokens[: length - 1], 7 + i],
                sampling if decoder else None,
                stream=i * 1_000_003,
                adapter=names[i],
            )
            for i, length in enumerate(LENGTHS)
        ]
    )
    outcomes: dict[int, Outcome] = {}
    while engine.num_unfinished:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
            outcomes[outcome.request_id] = outcome
    engine.close()
    return [outcomes[i] for i in range(len(LENGTHS))]


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU engine without its compiled library."""
    monkeypatch.setenv("DISABLE_CPU_EXTENSION", "1")


@pytest.mark.parametrize("family", NAMES)
def test_the_same_as_the_cpu_engine(ops: OpSet, family: str, tmp_path: Path) -> None:
    module = FAMILIES[family]
    decoder = isinstance(module.spec(module.tiny_config()), DecoderSpec)
    make_checkpoint(module.tiny_config(), tmp_path)
    found, expected = (run(tmp_path, backend, decoder, GREEDY) for backend in ("triton", "cpu"))
    if decoder:
        assert [o.token_ids for o in found] == [o.token_ids for o in expected]
        assert all(len(o.token_ids) == NUM_TOKENS for o in found)
    else:
        for own, other in zip(found, expected, strict=True):
            assert own.values is not None and other.values is not None
            torch.testing.assert_close(torch.tensor(own.values), torch.tensor(other.values), rtol=1e-4, atol=1e-5)


GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
QUICK = ("awq-32", "int-quantized-8-channel-inputs")
FORMATS = [pytest.param(v, marks=() if v.name in QUICK else pytest.mark.slow, id=v.name) for v in VARIANTS]


def assert_same_tokens(folder: Path, quantization: str | None = None) -> None:
    found, expected = (run(folder, backend, True, GREEDY, quantization=quantization) for backend in ("triton", "cpu"))
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert len({tuple(o.token_ids) for o in found}) > 1, "the same tokens whatever the prompt"


@pytest.mark.parametrize("variant", FORMATS)
def test_quantized_weights_give_the_tokens_of_the_cpu_engine(ops: OpSet, variant: Variant, tmp_path: Path) -> None:
    assert_same_tokens(write(variant, tmp_path)[0])


EXPERTS = ("awq-32", "gptq-4-64-act-gptq", "gptq-8-32-sym-act-gptq", "fp8-(32, 64)", "int-quantized-8-channel-inputs")


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name in EXPERTS], ids=str)
def test_quantized_experts_give_the_tokens_of_the_cpu_engine(ops: OpSet, variant: Variant, tmp_path: Path) -> None:
    config = {
        **FAMILIES["qwen3_moe"].tiny_config(), "moe_intermediate_size": 64, "num_hidden_layers": 1,
        "mlp_only_layers": [], "num_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    make_checkpoint(config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        stored = variant.quantize(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + end: part.contiguous() for end, part in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": variant.config}))
    assert_same_tokens(tmp_path)


@pytest.mark.slow
def test_gpt_oss_in_mxfp4_gives_the_tokens_of_the_cpu_engine(ops: OpSet, tmp_path: Path) -> None:
    config = FAMILIES["gpt_oss"].tiny_config()
    make_checkpoint(config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        made = mxfp4.quantize(tensors.pop(name).transpose(1, 2))
        tensors |= {f"{name}_blocks": made["blocks"], f"{name}_scales": made["scales"]}
    save_file(tensors, tmp_path / "model.safetensors")
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    assert_same_tokens(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", AT_LOAD)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_quantization_at_load_gives_the_tokens_of_the_cpu_engine(
    ops: OpSet, family: str, quantization: str, tmp_path: Path
) -> None:
    make_checkpoint(FAMILIES[family].tiny_config(), tmp_path)
    assert_same_tokens(tmp_path, quantization)


@pytest.mark.parametrize("kv_dtype", ["int4", *(pytest.param(d, marks=pytest.mark.slow) for d in ("int8", "fp8"))])
def test_quantized_caches(ops: OpSet, kv_dtype: str, tmp_path: Path) -> None:
    make_checkpoint(FAMILIES["llama"].tiny_config(), tmp_path)
    greedy = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    found, expected = (run(tmp_path, backend, True, greedy, kv_dtype=kv_dtype) for backend in ("triton", "cpu"))
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    exact = run(tmp_path, "cpu", True, greedy)
    assert logprobs(found) != pytest.approx(logprobs(exact), abs=1e-5), "the cache is not quantized"
    assert logprobs(found) == pytest.approx(logprobs(expected), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", pytest.param("deepseek_v2", marks=pytest.mark.slow)])
def test_adapters(ops: OpSet, family: str, tmp_path: Path) -> None:
    """Two of different ranks and a text without one, in one batch."""
    make_checkpoint(FAMILIES[family].tiny_config(), tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(("q_proj.weight", "o_proj.weight"))]
    for name, rank, some in (("a", 5, modules), ("b", 8, modules[:1])):
        write_adapter(tmp_path / name, weights, some, rank, seed=rank)
    adapters = {name: str(tmp_path / name) for name in "ab"}
    greedy = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    found, expected = (run(tmp_path / "base", b, True, greedy, adapters=adapters) for b in ("triton", "cpu"))
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert logprobs(found) == pytest.approx(logprobs(expected), abs=1e-3)
    plain = run(tmp_path / "base", "cpu", True, greedy)
    assert [a.token_ids == b.token_ids for a, b in zip(found, plain, strict=True)] == [False, False, True]


def logprobs(outcomes: list[Outcome]) -> list[float]:
    return [token.logprob for outcome in outcomes for token in outcome.logprobs or ()]


def test_sampled_tokens_are_those_of_the_cpu_engine(ops: OpSet, tmp_path: Path) -> None:
    """With every filter and penalty, and log-probabilities."""
    make_checkpoint(FAMILIES["llama"].tiny_config(), tmp_path)
    sampling = SamplingParams(
        max_tokens=NUM_TOKENS, temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2,
        presence_penalty=0.1, frequency_penalty=0.2, ignore_eos=True, logprobs=2,
    )  # fmt: skip
    found, expected = (run(tmp_path, backend, True, sampling) for backend in ("triton", "cpu"))
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    for own, other in zip(found, expected, strict=True):
        assert own.logprobs is not None and other.logprobs is not None
        assert [p.top_ids for p in own.logprobs] == [p.top_ids for p in other.logprobs]
        for a, b in zip(own.logprobs, other.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "falcon_h1"])
def test_models_of_transformers(ops: OpSet, name: str, tmp_path: Path) -> None:
    """One whose attention goes to the kernels, with a head of 12, and one that keeps states of its own."""
    make_checkpoint(CONFIGS[name], tmp_path)
    found, expected = (run(tmp_path, backend, True, GREEDY, "transformers") for backend in ("triton", "cpu"))
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
