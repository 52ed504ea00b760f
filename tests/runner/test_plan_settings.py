"""Engine settings in a plan: where they may stand, their bounds, and what carries over to another engine."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from dataclasses import replace
from typing import Any

import pytest

from engines import discover
from engines.api import EngineConfig
from engines.checkpoint import SentenceConfig
from runner.config import ModelConfig
from runner.errors import ConfigError
from runner.plan import convert, resolve
from tests.runner.planning import BERT, CPU, EmbedConfig, checkpoint, job


def test_sentence_encoders_keep_their_length() -> None:
    opened = replace(checkpoint(BERT), sentence=SentenceConfig("mean", True, 256))
    assert resolve(job(task=EmbedConfig("embed")), opened, CPU, "embed").settings.config.max_model_len == 256
    asked = job(task=EmbedConfig("embed"), model=ModelConfig("x", max_model_len=300))
    assert resolve(asked, opened, CPU, "embed").settings.config.max_model_len == 300


@pytest.mark.parametrize(("key", "value"), [("max_model_len", 100), ("dtype", "float32")])
def test_a_setting_of_two_groups_may_stand_in_either(key: str, value: Any) -> None:
    other = {"max_model_len": 200, "dtype": "float16"}[key]
    for changes in (
        {"model": ModelConfig("x", **{key: value})},
        {"backend_config": EngineConfig(**{key: value})},
        {"model": ModelConfig("x", **{key: value}), "backend_config": EngineConfig(**{key: value})},
    ):
        assert getattr(resolve(job(**changes), checkpoint(), CPU, "generate").settings.config, key) == value
    both = job(model=ModelConfig("x", **{key: value}), backend_config=EngineConfig(**{key: other}))
    with pytest.raises(ConfigError, match=f"model.{key}: {value} with backend_config.{key}: {other}"):
        resolve(both, checkpoint(), CPU, "generate")


def test_a_length_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.max_model_len: 8193; expected at most 8192"):
        resolve(job(model=ModelConfig("x", max_model_len=8193)), checkpoint(), CPU, "generate")
    dynamic = checkpoint(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    plan = resolve(job(model=ModelConfig("x", max_model_len=16384)), dynamic, CPU, "generate")
    assert plan.settings.config.max_model_len == 16384


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("block_size", 24, "a power of two"),
        ("block_size", 0, "a power of two"),
        ("max_num_seqs", 0, "at least 1"),
        ("max_num_batched_tokens", 0, "at least 1"),
        ("kv_memory_fraction", 1.5, "more than 0 and at most 1"),
        ("kv_cache_bytes", 0, "at least 1, or null"),
    ],
)
def test_engine_settings_out_of_bounds(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"backend_config.{key}: {value}; expected .*{expected}"):
        resolve(job(backend_config=replace(EngineConfig(), **{key: value})), checkpoint(), CPU, "generate")


UNLIKE_DEFAULTS = {
    "dtype": "float16", "max_model_len": 77, "max_num_seqs": 3, "max_num_batched_tokens": 99, "block_size": 64,
    "kv_dtype": "fp8", "kv_cache_bytes": 1 << 20, "kv_memory_fraction": 0.25, "prefix_caching": False,
}  # fmt: skip


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(EngineConfig)])
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(discover.backends(), 2)))
def test_every_shared_setting_carries_over(field: str, source: str, target: str) -> None:
    value = UNLIKE_DEFAULTS[field]  # a KeyError here: a new field needs a value
    config = importlib.import_module(f"engines.{source}.offers").Config(**{field: value})
    assert value != getattr(type(config)(), field)
    converted, lost = convert(config, target)
    assert type(converted) is importlib.import_module(f"engines.{target}.offers").Config
    assert {**dataclasses.asdict(converted), field: value} == dataclasses.asdict(converted)
    assert lost == []


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(discover.backends(), 2)))
def test_every_own_setting_that_is_lost_is_named(source: str, target: str) -> None:
    own = importlib.import_module(f"engines.{source}.offers").Config
    shared = {f.name for f in dataclasses.fields(importlib.import_module(f"engines.{target}.offers").Config)}
    for f in dataclasses.fields(own):
        if f.name in shared:
            continue
        for value in (0, False, 4):
            converted, lost = convert(own(**{f.name: value}), target)
            assert lost == [f"backend_config.{f.name}={value}: not carried over, {target} has no such setting"]
            assert not hasattr(converted, f.name)
