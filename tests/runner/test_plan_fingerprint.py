"""A job's fingerprint: all that can change a result, nothing that only steers the run, and no secret."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engines.api import EngineConfig, SamplingParams
from runner.config import DatasetConfig, HostConfig, ModelConfig, OutputConfig
from runner.fingerprint import fingerprint, spell
from runner.plan import resolve
from tests.runner.planning import CPU, EmbedConfig, checkpoint, job


def prints(**changes: Any) -> dict[str, str]:
    asked = job(**changes)
    return fingerprint(
        asked,
        resolve(asked, checkpoint(), CPU, "generate").settings,
        "digest",
        dict.fromkeys(asked.model.adapters, "f00"),
    )


STEERING = {
    "mode": "plan",
    "max_runtime_s": 5.0,
    "max_error_rate": 0.1,
    "max_consecutive_errors": None,
    "grace_s": 1.0,
    "window_rows": 7,
    "retry_errors": True,
    "on_change": "new",
    "on_unsupported": "fallback",
    "output": OutputConfig(folder="elsewhere", compression="gzip", row_group_rows=5, journal_interval_s=9.0),
    "backend_config": EngineConfig(
        max_num_seqs=5, max_num_batched_tokens=64, kv_cache_bytes=1 << 30, prefix_caching=False
    ),
    "host": HostConfig(price_per_hour=3.0),
}


@pytest.mark.parametrize("key", STEERING)
def test_what_only_steers_the_run_is_not_in_the_fingerprint(key: str) -> None:
    assert prints(**{key: STEERING[key]}) == prints()


MATTERS = {
    "seed": ({"seed": 1}, {"seed"}),
    "samples": ({"samples": 2}, {"samples"}),
    "numerics": ({"numerics": "fast"}, {"numerics"}),
    "sampling": ({"sampling": SamplingParams(temperature=0.5, stop=("a",))}, {"sampling.temperature", "sampling.stop"}),
    "sampling columns": ({"sampling_columns": {"top_k": "k"}}, {"sampling_columns"}),
    "dtype": ({"model": ModelConfig("x", dtype="float32")}, {"dtype"}),
    "quantization": ({"model": ModelConfig("x", quantization="w8a16")}, {"model.quantization"}),
    "length": ({"model": ModelConfig("x", max_model_len=9)}, {"max_model_len"}),
    "adapters": (
        {"model": ModelConfig("x", adapters={"a": "folder"}, adapter="a", adapter_column="c")},
        {"model.adapters", "model.adapter", "model.adapter_column"},
    ),
    "kv dtype": ({"backend_config": EngineConfig(kv_dtype="int8")}, {"kv_dtype"}),
    "block size": ({"backend_config": EngineConfig(block_size=16)}, {"block_size"}),
    "task": ({"task": EmbedConfig("generate", pooling="x")}, {"task.pooling", "task.normalize"}),
    "dataset": (
        {"dataset": DatasetConfig("y", "csv", filter="a > 1", limit=3, chunk_rows=5, id_column="i", split="s")},
        {f"dataset.{key}" for key in ("path", "format", "filter", "limit", "chunk_rows", "id_column", "split")},
    ),
    "columns": ({"output": OutputConfig(keep_columns=[], token_ids=True)}, {"output.keep_columns", "output.token_ids"}),
}


@pytest.mark.parametrize("case", MATTERS)
def test_what_can_change_a_result_is_in_the_fingerprint(case: str) -> None:
    changes, keys = MATTERS[case]
    first, second = prints(), prints(**changes)
    assert {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)} == keys


def test_fingerprints_are_readable_and_hold_no_secret() -> None:
    assert all(len(value) <= 160 for value in prints(dataset=DatasetConfig("x" * 5000)).values())
    assert spell("a" * 5000) != spell("a" * 4999 + "b")
    assert prints(dataset=DatasetConfig("s3://key:secret@bucket/a"))["dataset.path"] == "s3://bucket/a"
    signed = prints(dataset=DatasetConfig("https://host/a.parquet?X-Signature=abc"))
    assert signed["dataset.path"] == "https://host/a.parquet"
    assert prints(dataset=DatasetConfig("/a b/c?d=*.parquet"))["dataset.path"] == "/a b/c?d=*.parquet"


def test_a_plan_shows_no_secret() -> None:
    plan = resolve(job(dataset=DatasetConfig("s3://key:secret@bucket/a")), checkpoint(), CPU, "generate")
    assert "secret" not in plan.text() and "secret" not in json.dumps(plan.to_dict())
