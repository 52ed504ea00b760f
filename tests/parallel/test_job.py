"""Whole jobs on engines of several ranks: processes that talk over gloo, and what happens when one is lost."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines import discover
from engines.api import EngineConfig
from runner.config import ParallelismConfig
from runner.errors import EngineError
from runner.job import run
from tests.parallel import cases, fragile
from tests.parity.checkpoints import make_checkpoint
from tests.small_job import make_plan, read_output, write_rows, write_tokenizer

TEXTS = [f"row {i}, {'and so on ' * (i % 4)}" for i in range(24)]
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc names a process's children")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    family, sizes = cases.SIZES["moe"]
    make_checkpoint(discover.families()[family].tiny_config() | sizes | {"vocab_size": 256}, folder)
    write_tokenizer(folder)
    return folder


def plan_of(folder: Path, model: Path, tp: int = 1, dp: int = 1, ep: int = 1, **changes: Any) -> Any:
    if not (folder / "model").exists():
        (folder / "model").symlink_to(model)
        write_rows(folder / "rows", TEXTS)
    plan = make_plan(folder, parallelism=ParallelismConfig(tp, dp, ep), **changes)
    config = EngineConfig(max_model_len=64, max_num_seqs=8, block_size=8, kv_cache_bytes=4 << 20)
    settings = replace(plan.settings, config=config, dtype="float32", tp=tp, ep=ep)
    return replace(plan, settings=settings)


def log_of(folder: Path, name: str = "job") -> str:
    return (folder / "out" / name / "run.log").read_text()


@pytest.mark.parametrize(
    ("tp", "dp", "ep"),
    [
        (2, 1, 2),
        pytest.param(2, 2, 1, marks=pytest.mark.slow),
        pytest.param(4, 1, 1, marks=pytest.mark.slow),
        pytest.param(2, 2, 4, marks=pytest.mark.slow),
    ],
)
def test_the_output_is_that_of_one_process(tp: int, dp: int, ep: int, model: Path, tmp_path: Path) -> None:
    one = run(plan_of(tmp_path, model, name="one"))
    several = run(plan_of(tmp_path, model, tp, dp, ep, name="several"))
    expected, found = read_output(one.folder), read_output(several.folder)
    assert expected.column("error_code").null_count == len(TEXTS)
    assert found.equals(expected)
    assert "starting it again" not in log_of(tmp_path, "several")


@linux
@pytest.mark.parametrize("loader", [fragile.load_and_lose, pytest.param(fragile.load_and_stop, marks=pytest.mark.slow)])
def test_an_engine_that_loses_a_rank_is_started_again(
    loader: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fragile.PIDS, str(tmp_path / "pids"))
    summary = run(plan_of(tmp_path, model, 2, step_timeout_s=6.0), loader=loader)
    table = read_output(summary.folder)
    assert summary.num_rows == len(TEXTS) and table.column("error_code").null_count == len(TEXTS)
    assert log_of(tmp_path).count("starting it again") == 1
    engines = (tmp_path / "pids").read_text().splitlines()
    assert len(engines) == 2 and all(len(pids.split()) == 1 for pids in engines)
    gone(map(int, " ".join(engines).split()))


@linux
@pytest.mark.slow
def test_a_rank_that_cannot_load_is_one_message(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fragile.PIDS, str(tmp_path / "pids"))
    with pytest.raises(EngineError, match=r"engine cpu: cannot load"):
        run(plan_of(tmp_path, model, 2), loader=fragile.load_and_lose_always)
    assert "rank 1" in log_of(tmp_path)


def gone(pids: Any) -> None:
    """Nothing of a job outlives it."""
    for pid in pids:
        end = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists(), f"process {pid} is still there"
