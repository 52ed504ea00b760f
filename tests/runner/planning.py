"""A model, two machines and a job to plan for: what the tests of plans share."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import pytest

from engines import discover
from engines.api import EngineConfig, SamplingParams
from engines.capability import Offer, one_of
from engines.checkpoint import Checkpoint
from engines.cpu.offers import OPS
from engines.platform import Host
from runner.config import DatasetConfig, HostConfig, JobConfig, ModelConfig, TaskConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "eos_token_id": 128001,
}

BERT = {**discover.families()["bert"].tiny_config(), "torch_dtype": "float32"}

H200 = Host(
    "h200", "cuda", "NVIDIA H200", 1, (9, 0), 141 << 30, 141 << 30, 4.8e12, 989e12, 67e12, "13.0", 4.0,
    extensions=frozenset({"cpu", "cuda"}), triton=True,
)  # fmt: skip

CPU = Host(
    "this", "cpu", "a CPU", 1, None, 64 << 30, 60 << 30, cpu_name="a CPU", cpu_cores=8, cpu_memory_bytes=60 << 30,
    cpu_dtypes=frozenset({"float32", "bfloat16"}), extensions=frozenset({"cpu"}), triton=True,
)  # fmt: skip

NO_DRIVER = "cuda is not available. No NVIDIA driver was found: install one, or use backend=cpu"


@dataclass(frozen=True)
class EmbedConfig(TaskConfig):
    pooling: str | None = None
    normalize: bool | None = None


def checkpoint(config: dict[str, Any] = LLAMA, **changes: Any) -> Checkpoint:
    config = {**config, **changes}
    return Checkpoint("/models/x", config, config["architectures"][0], {}, {})


def job(**changes: Any) -> JobConfig:
    base = JobConfig(
        name="test",
        model=ModelConfig("models/x"),
        dataset=DatasetConfig("rows.parquet"),
        task=TaskConfig("generate"),
        sampling=SamplingParams(),
        backend_config=EngineConfig(),
    )
    return replace(base, **changes)


def planning(host: Host, **changes: Any) -> JobConfig:
    return job(mode="plan", host=HostConfig(name=host.name), **changes)


def missed(plan: Any, engine: str) -> tuple[str, ...]:
    return next(verdict.missed for verdict in plan.verdicts if verdict.engine == engine)


def offer_everything(monkeypatch: pytest.MonkeyPatch, backend: str, **changes: Any) -> None:
    """Give an engine that this version has no op set for the offer of the CPU engine, two devices wide."""
    ops = {**OPS, "parallelism": {"tp": one_of(1, 2), "dp": one_of(1, 2), "ep": one_of(1)}}
    module = importlib.import_module(f"engines.{backend}.offers")
    offered = Offer(engine=backend, ops=ops, since={"bfloat16": (8, 0)}, **changes)
    monkeypatch.setattr(module, "offers", lambda host: replace(offered, sm=host.compute_capability))


def offer_nothing(monkeypatch: pytest.MonkeyPatch, *backends: str) -> None:
    for backend in backends:
        monkeypatch.setattr(f"engines.{backend}.offers.offers", lambda host, name=backend: Offer(engine=name))
