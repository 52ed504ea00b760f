"""Identical greedy tokens to transformers, through the engine: plain, chunked, preempted, with shared prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines import discover
from engines.api import EngineConfig, EngineSettings, Request, SamplingParams
from engines.models.load import load_model
from engines.models.spec import DecoderSpec
from engines.ops import OpSet
from tests.parity.checkpoints import make_checkpoint
from tests.parity.fallback import CONFIGS
from tests.parity.greedy import LENGTHS, NUM_TOKENS, Sample, greedy_samples, make_prompts
from tests.parity.ragged import greedy

FAMILIES = discover.families()
NATIVE = [n for n, f in FAMILIES.items() if isinstance(f.spec(f.tiny_config()), DecoderSpec)]
FALLBACK = ["gpt2", "gpt_neox", "falcon_h1", "mamba"]
MAX_MODEL_LEN = 384
COUNT = 64
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {"prefix_caching": False},
    "reused": {"prefix_caching": True, "max_num_seqs": 16},
    "chunked": {"max_num_batched_tokens": 50, "max_num_seqs": 24, "prefix_caching": False},
    "preempted": {"num_blocks": 61, "max_num_seqs": 32, "prefix_caching": True},
}


def alone(config: dict[str, Any]) -> bool:
    """Whether transformers' result for a text depends on the others of its batch."""
    kind = (config.get("rope_scaling") or {}).get("rope_type", (config.get("rope_scaling") or {}).get("type"))
    return kind in ("dynamic", "longrope") or "mamba" in str(config)


class Subject:
    """A checkpoint and what transformers continues its prompts with."""

    def __init__(self, name: str, folder: Path) -> None:
        native = name in FAMILIES
        config = FAMILIES[name].tiny_config() if native else CONFIGS[name]
        self.name, self.folder = name, folder
        self.implementation = "native" if native else "transformers"
        reference = make_checkpoint(config, folder)
        prompts = make_prompts(config["vocab_size"], COUNT + 12)
        self.samples = greedy_samples(reference, prompts, not alone(config), COUNT)
        self.spec = FAMILIES[name].spec(config) if native else None

    def settings(self, num_blocks: int | None = None, **changes: Any) -> EngineSettings:
        block_bytes = None
        if num_blocks is not None and self.spec is not None:
            spec = self.spec
            block_bytes = num_blocks * 8 * 2 * 4 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim
        config = EngineConfig(
            max_model_len=MAX_MODEL_LEN, block_size=8, kv_cache_bytes=block_bytes or 64 << 20, **changes
        )
        return EngineSettings(
            backend="cpu",
            model_path=str(self.folder),
            dtype="float32",
            config=config,
            implementation=self.implementation,
        )


def run(settings: EngineSettings, samples: list[Sample]) -> tuple[list[list[int]], Any, int]:
    """(tokens of each sample, the engine's stats, prompt tokens that were reused)"""
    load = pytest.importorskip("engines.load")
    engine = load.load_engine(settings)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    engine.submit([Request(i, "generate", sample.prompt, sampling) for i, sample in enumerate(samples)])
    outcomes = {}
    while engine.num_unfinished:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
            outcomes[outcome.request_id] = outcome
    stats = engine.stats()
    engine.close()
    reused = sum(outcome.num_cached_tokens for outcome in outcomes.values())
    return [outcomes[i].token_ids for i in range(len(samples))], stats, reused


def check(found: list[list[int]], samples: list[Sample]) -> None:
    different = []
    for i, (tokens, sample) in enumerate(zip(found, samples, strict=True)):
        if tokens != sample.expected:
            same = [a == b for a, b in zip(tokens, sample.expected, strict=False)]
            first = same.index(False) if False in same else len(same)
            different.append(f"prompt {i} of {len(sample.prompt)} tokens from token {first} on")
    assert not different, f"{len(different)} of {len(samples)} differ: " + "; ".join(different[:5])


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return {}


@pytest.fixture
def subject(request: pytest.FixtureRequest, subjects: dict[str, Subject], tmp_path_factory: Any) -> Subject:
    name = request.param
    if name not in subjects:
        subjects[name] = Subject(name, tmp_path_factory.mktemp(name))
    return subjects[name]


@pytest.mark.parametrize("subject", NATIVE + FALLBACK, indirect=True)
def test_model_alone(subject: Subject) -> None:
    """A prompt of each length without an engine: tells a fault of the model from one of the engine."""
    samples = subject.samples[: len(LENGTHS)]
    ops = OpSet()
    model = load_model(subject.settings(), ops)
    check(greedy(model, ops, [sample.prompt for sample in samples], NUM_TOKENS), samples)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("subject", NATIVE, indirect=True)
def test_native(subject: Subject, scenario: str) -> None:
    found, stats, reused = run(subject.settings(**SCENARIOS[scenario]), subject.samples)
    check(found, subject.samples)
    assert (reused > 0) == SCENARIOS[scenario]["prefix_caching"]
    assert (stats.num_preemptions > 0) == (scenario == "preempted")


@pytest.mark.parametrize("scenario", ["plain", "chunked"])
@pytest.mark.parametrize("subject", FALLBACK, indirect=True)
def test_fallback(subject: Subject, scenario: str) -> None:
    found, _, _ = run(subject.settings(**SCENARIOS[scenario]), subject.samples)
    check(found, subject.samples)
