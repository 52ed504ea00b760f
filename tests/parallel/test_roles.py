"""Whole jobs of engines that compute prompts and engines that go on with them, and what happens when one is killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines import discover
from engines.api import EngineConfig, SamplingParams
from engines.core.engine import UNREAD_PROMPTS
from runner import engine_main
from runner.config import ParallelismConfig
from runner.job import run
from runner.parallel import layout_of
from tests.parallel import cases, fragile
from tests.parity.checkpoints import make_checkpoint
from tests.small_job import make_plan, read_output, write_rows, write_tokenizer

TEXTS = [f"row {i}, {'and so on ' * (i % 4)}" for i in range(48)]
SAMPLED = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, top_p=0.9)
HYBRID, SPLIT = ParallelismConfig(), ParallelismConfig(dp=2, prefill=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    family, sizes = cases.SIZES["gqa"]
    make_checkpoint(discover.families()[family].tiny_config() | sizes | {"vocab_size": 256}, folder)
    write_tokenizer(folder)
    return folder


def plan_of(folder: Path, model: Path, parallelism: ParallelismConfig, texts: list[str] = TEXTS, **changes: Any) -> Any:
    if not (folder / "model").exists():
        (folder / "model").symlink_to(model)
        write_rows(folder / "rows", texts)
    plan = make_plan(folder, parallelism=parallelism, sampling=SAMPLED, **changes)
    config = EngineConfig(max_model_len=64, max_num_seqs=8, block_size=8, kv_cache_bytes=4 << 20)
    return replace(plan, settings=replace(plan.settings, config=config, tp=parallelism.tp))


def log_of(folder: Path, name: str = "job") -> str:
    return (folder / "out" / name / "run.log").read_text()


@pytest.mark.parametrize(
    "parallelism", [SPLIT, pytest.param(ParallelismConfig(tp=2, dp=3, prefill=2), marks=pytest.mark.slow)]
)
def test_the_output_is_that_of_one_engine(parallelism: ParallelismConfig, model: Path, tmp_path: Path) -> None:
    one = run(plan_of(tmp_path, model, HYBRID, name="one"))
    plan = plan_of(tmp_path, model, parallelism, name="several")
    several = run(plan)
    assert read_output(several.folder).equals(read_output(one.folder))
    log = log_of(tmp_path, "several")
    for engine in range(layout_of(plan.job).num_engines):
        assert f"engine cpu {engine} ({layout_of(plan.job).role(engine)}): " in log
    assert "starting it again" not in log and UNREAD_PROMPTS not in log


@pytest.mark.slow
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_kill_changes_nothing(role: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fragile.PIDS, str(tmp_path / "killed"))
    monkeypatch.setenv(fragile.ROLE, role)
    one = run(plan_of(tmp_path, model, HYBRID, name="one"), loader=engine_main.load)
    several = run(plan_of(tmp_path, model, SPLIT, name="several"), loader=fragile.load_and_end)
    assert read_output(several.folder).equals(read_output(one.folder))
    log = log_of(tmp_path, "several")
    assert log.count("starting it again") == 1 and f"({role}): the process was killed" in log


@pytest.mark.slow
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_row_that_kills_is_isolated(role: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fragile.ROLE, role)
    texts = [f"#{text}" if i == 17 else text for i, text in enumerate(TEXTS)]
    summary = run(plan_of(tmp_path, model, SPLIT, texts), loader=fragile.load_and_choke)
    errors = read_output(summary.folder).column("error_code").to_pylist()
    assert [(i, code) for i, code in enumerate(errors) if code] == [(17, "engine_died")]
