"""What goes wrong within a real engine is an error of its row, or costs speed: never another row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

import engines.load
from engines import discover
from engines.api import EngineSettings, SamplingParams
from engines.batch import Batch
from engines.core.engine import LLMEngine
from engines.cpu.offers import Config
from runner import engine_main
from runner.config import DatasetConfig, JobConfig, ModelConfig, OutputConfig
from runner.engine_main import Watch
from runner.errors import TooManyErrors
from runner.job import run
from runner.plan import make_plan
from runner.tasks import generate
from tests.parity.checkpoints import make_checkpoint
from tests.small_job import read_output, write_rows, write_tokenizer

LONG = 40
"""Tokens of a text at which `load_breaking` breaks."""
FEW = 48
"""Tokens of a step that `load_tight` has memory for."""
TEXTS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint({**discover.families()["llama"].tiny_config(), "vocab_size": 256}, folder)
    write_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][ord("N") - 33] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def job_of(folder: Path, model: Path, texts: list[str | None], **changes: Any) -> JobConfig:
    job = JobConfig(
        name="job",
        model=ModelConfig(str(model)),
        dataset=DatasetConfig(path=str(write_rows(folder / "rows", texts))),
        task=generate.Config(name="generate", prompt="{{ text }}{{ 1 // (text | length - 4) and '' }}"),
        sampling=SamplingParams(max_tokens=12, ignore_eos=True),
        backend="cpu",
        backend_config=Config(kv_cache_bytes=1 << 20, num_threads=1, max_model_len=64),
        output=OutputConfig(folder=str(folder / "out")),
        max_error_rate=1.0,
    )
    return replace(job, **changes)


def output_of(job: JobConfig, loader: Any = engine_main.load) -> pa.Table:
    return read_output(run(make_plan(job), loader=loader).folder)


def wrap(engine: LLMEngine, look: Callable[[Batch], None]) -> None:
    """Have the model look at each batch before it computes it."""
    forward = engine.model.forward

    def looking(batch: Batch, caches: Any) -> torch.Tensor:
        look(batch)
        return forward(batch, caches)

    engine.model.forward = looking  # type: ignore[method-assign]


def load_breaking(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> LLMEngine:
    """A real engine that raises for the token P in a prompt, and where a text grows to LONG tokens."""
    permission()
    engine = engines.load.load_engine(settings, None, watch)

    def look(batch: Batch) -> None:
        if bool((batch.token_ids == ord("P") - 33).any()):
            raise RuntimeError("a defect in prefill")
        if bool((batch.positions == LONG).any()):
            raise RuntimeError("a defect in decode")

    wrap(engine, look)
    return engine


def load_tight(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> LLMEngine:
    """A real engine that has memory for 16 blocks and steps of FEW tokens."""
    permission()
    real = engines.load.LLMEngine

    def make(model: Any, ops: Any, config: Any, num_blocks: int, *args: Any) -> LLMEngine:
        if num_blocks > 16:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, ops, config, num_blocks, *args)

    engines.load.LLMEngine = make  # type: ignore[assignment, misc]
    engine = engines.load.load_engine(settings, None, watch)

    def look(batch: Batch) -> None:
        if batch.num_tokens > FEW:
            raise torch.OutOfMemoryError("out of memory")

    wrap(engine, look)
    return engine


def test_each_kind_of_failure_is_an_error_of_its_row(tmp_path: Path, model: Path) -> None:
    """In the input, the template, the tokenizer's limit, prefill, decode and the logits."""
    long = "x" * (LONG - 6)
    bad: list[str | None] = [None, "four", "x" * 80, "Prefill", long, "NaN", "ends with N"]
    codes = ["null_input", "template_error", "too_long", "engine_error", "engine_error", "nan_logits", "nan_logits"]
    texts = [text for pair in zip(bad, TEXTS[:3] * 3, strict=False) for text in pair]
    rows = output_of(job_of(tmp_path, model, texts), load_breaking).to_pylist()
    assert [row["error_code"] for row in rows[::2]] == codes
    assert "a defect in prefill" in rows[6]["error_message"] and "a defect in decode" in rows[8]["error_message"]
    assert all(row["text"] is None for row in rows[::2])
    alone = output_of(job_of(tmp_path / "good", model, TEXTS[:3]), engine_main.load).column("text").to_pylist()
    assert [(row["error_code"], row["text"]) for row in rows[1::2]] == [(None, (alone * 3)[i]) for i in range(len(bad))]


def test_memory_that_runs_out_makes_steps_and_cache_smaller(tmp_path: Path, model: Path) -> None:
    texts = [text for text in TEXTS * 4 if text not in ("four", "five", "nine")]
    job = job_of(tmp_path, model, texts)
    table = output_of(job, load_tight)
    assert table.column("error_code").null_count == len(texts)
    plenty = output_of(job_of(tmp_path / "plenty", model, texts))
    assert table.column("text").equals(plenty.column("text"))
    amendments = json.loads((tmp_path / "out" / "job" / "plan.json").read_text())["amendments"]
    assert any("KV cache" in note for note in amendments) and any(
        "max_num_batched_tokens" in note for note in amendments
    )


def test_a_job_that_fails_everywhere_is_stopped_and_says_why(tmp_path: Path, model: Path) -> None:
    texts = [f"{'N' if i % 10 else 'P'}ope" * 2 for i in range(400)]
    with pytest.raises(TooManyErrors, match=r"max_consecutive_errors: .* with nan_logits: the model"):
        run(make_plan(job_of(tmp_path, model, texts, max_consecutive_errors=50)), loader=load_breaking)
    with pytest.raises(TooManyErrors, match=r"max_error_rate: .* with nan_logits: the model"):
        run(make_plan(job_of(tmp_path, model, texts, max_error_rate=0.2, name="rate")), loader=load_breaking)


def test_retry_computes_only_the_rows_that_failed(tmp_path: Path, model: Path) -> None:
    texts = [f"P {text}" if i % 4 == 0 else text for i, text in enumerate(TEXTS * 3) if text not in ("four", "five")]
    job = job_of(tmp_path, model, texts)
    first = run(make_plan(job), loader=load_breaking)
    before = read_output(first.folder)
    again = run(make_plan(replace(job, retry_errors=True)))
    table = read_output(again.folder)
    assert first.num_errors == again.counts.num_rows == sum(text.startswith("P") for text in texts) > 0
    kept = [i for i, text in enumerate(texts) if not text.startswith("P")]
    assert again.num_errors == 0 and table.take(kept).equals(before.take(kept))
    assert table.column("id").to_pylist() == list(range(len(texts)))
