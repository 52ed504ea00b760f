"""Engines in processes of their own: whatever ends or hangs one costs the rows that did it, and no others."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engines.api import EngineConfig, EngineSettings
from engines.cpu.offers import Config
from runner.config import ParallelismConfig
from runner.errors import EngineError, InputError, Interrupted
from runner.job import run
from runner.parallel import Layout, visible_devices
from runner.plan import Plan
from runner.workers import each_worker
from tests import faulty_engine
from tests.crash.child import start
from tests.fake_engine import FakeEngine
from tests.small_job import make_plan, read_output, write_rows

BAD = {17: "S", 40: "K", 41: "X", 90: "R"}
TEXTS = [f"{BAD.get(i, 'r')}ow {i}" for i in range(120)]


def plan_of(folder: Path, texts: list[str], max_num_seqs: int = 8, **changes: Any) -> Plan:
    if not (folder / "rows").exists():
        write_rows(folder / "rows", texts)
    plan = make_plan(folder, **changes)
    config = EngineConfig(max_model_len=64, max_num_seqs=max_num_seqs)
    return replace(plan, settings=replace(plan.settings, config=config))


def log_of(folder: Path, name: str = "job") -> str:
    return (folder / "out" / name / "run.log").read_text()


def without_errors(table: pa.Table) -> list[int]:
    return [i for i, code in enumerate(table.column("error_code").to_pylist()) if code is None]


def test_the_output_is_that_of_an_engine_in_this_process(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [f"row {i}" for i in range(500)], samples=2)
    summary = run(plan, loader=faulty_engine.load)
    here = run(plan_of(tmp_path, [], samples=2, name="here"), FakeEngine())
    assert read_output(summary.folder).equals(read_output(here.folder))
    assert summary.counts.num_output_tokens == here.counts.num_output_tokens > 0
    assert "engine cpu:" in log_of(tmp_path) and "starting it again" not in log_of(tmp_path)


def test_requests_that_end_the_process_are_errors_of_their_rows(tmp_path: Path) -> None:
    summary = run(plan_of(tmp_path, TEXTS), loader=faulty_engine.load)
    table = read_output(summary.folder)
    assert (summary.finished, summary.num_rows, summary.num_errors) == (True, 120, len(BAD))
    assert without_errors(table) == [i for i in range(120) if i not in BAD]
    messages = table.column("error_message").to_pylist()
    assert {table.column("error_code")[i].as_py() for i in BAD} == {"engine_died"}
    assert "SIGSEGV" in messages[17] and "SIGKILL" in messages[40] and "exit code 3" in messages[41]
    assert "a defect of the engine" in messages[90]
    good = [text.replace("S", "r").replace("K", "r") for text in TEXTS]
    write_rows(tmp_path / "good" / "rows", good)
    undisturbed = read_output(run(make_plan(tmp_path / "good"), FakeEngine()).folder)
    assert (
        table.column("text").take(without_errors(table)).equals(undisturbed.column("text").take(without_errors(table)))
    )
    assert "requests are tried apart from the others" in log_of(tmp_path)


def test_all_samples_of_a_prompt_that_ends_the_process_are_one_error(tmp_path: Path) -> None:
    summary = run(plan_of(tmp_path, ["fine", "S", "fine too"], samples=4), loader=faulty_engine.load)
    assert read_output(summary.folder).column("error_code").to_pylist() == [None, "engine_died", None]


@pytest.mark.parametrize("dp", [1, 2])
def test_a_prompt_that_ends_the_process_is_tried_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dp: int
) -> None:
    """Whatever waits of it: more samples than a step has, at several engines, and the same text in other rows."""
    pids = tmp_path / "pids"
    monkeypatch.setenv(faulty_engine.PIDS, str(pids))
    texts = ["S" if i in (10, 30, 50) else f"row {i}" for i in range(60)]
    spread = ParallelismConfig(dp=dp)
    plan = plan_of(tmp_path, texts, 4, samples=64, window_rows=64, parallelism=spread)
    summary = run(plan, loader=faulty_engine.load)
    assert (summary.num_rows, summary.num_errors) == (60, 3)
    codes = read_output(summary.folder).column("error_code").to_pylist()
    assert [i for i, code in enumerate(codes) if code == "engine_died"] == [10, 30, 50]
    # An engine dies of it in a step of 4, in one of 2 and alone; other engines may have been computing it as well.
    assert len(pids.read_text().split()) <= dp + 4 * dp


def test_retry_does_them_again(tmp_path: Path) -> None:
    run(plan_of(tmp_path, TEXTS), loader=faulty_engine.load)
    engine = FakeEngine()
    summary = run(plan_of(tmp_path, TEXTS, retry_errors=True), engine)
    assert engine.num_requests == len(BAD) and summary.num_errors == 0


def test_a_step_that_hangs_is_ended_and_its_stacks_are_in_the_log(tmp_path: Path) -> None:
    texts = [f"{'H' if i == 5 else 'r'}ow {i}" for i in range(20)]
    summary = run(plan_of(tmp_path, texts, 4, step_timeout_s=0.5), loader=faulty_engine.load)
    table = read_output(summary.folder)
    assert without_errors(table) == [i for i in range(20) if i != 5]
    assert "no step ended in 0.5 s (step_timeout_s)" in table.column("error_message")[5].as_py()
    assert "this_hangs" in log_of(tmp_path)


def test_an_engine_that_is_killed_for_its_memory_gets_less_to_do(tmp_path: Path) -> None:
    summary = run(plan_of(tmp_path, [f"row {i}" for i in range(60)], 32), loader=faulty_engine.load_hungry)
    assert (summary.num_rows, summary.num_errors) == (60, 0)
    amendments = json.loads((Path(summary.folder) / "plan.json").read_text())["amendments"]
    assert (
        "most likely for its memory" in amendments[-1]
        and f"max_num_seqs={faulty_engine.LARGEST_STEP}" in amendments[-1]
    )
    assert f"plan amended: {amendments[0]}" in log_of(tmp_path)


def test_what_an_engine_says_of_itself_is_in_the_plan(tmp_path: Path) -> None:
    summary = run(plan_of(tmp_path, ["row"]), loader=faulty_engine.load_shrunk)
    plan = json.loads((Path(summary.folder) / "plan.json").read_text())
    assert plan["amendments"] == ["no memory for a KV cache of 8 blocks: going on with 4"]


def test_an_engine_that_computes_nothing_is_given_up(tmp_path: Path) -> None:
    texts = [f"row {i}" for i in range(20)]
    with pytest.raises(EngineError, match="expected an engine that gives any outcome"):
        run(plan_of(tmp_path, texts), loader=faulty_engine.load_dies_always)
    summary = run(plan_of(tmp_path, texts), FakeEngine())
    assert summary.num_rows == 20


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (faulty_engine.load_no_memory, EngineError, "engine cpu: cannot load .*no room; expected a model that fits"),
        (
            faulty_engine.load_old_library,
            EngineError,
            "cannot load .*other sources; expected those here; build it again;",
        ),
        (faulty_engine.load_bad_checkpoint, InputError, "model.path: w: expected a tensor"),
        (faulty_engine.load_dies, EngineError, "cannot load .*killed by the system .*expected a model that fits"),
    ],
)
def test_an_engine_that_cannot_be_loaded_is_said_in_one_message(
    tmp_path: Path, loader: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(plan_of(tmp_path, ["row"]), loader=loader)


def test_a_job_leaves_while_its_engine_is_being_loaded(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(Interrupted, match="max_runtime_s"):
        run(plan_of(tmp_path, ["row"], max_runtime_s=0.5), loader=faulty_engine.load_slowly)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_engine_outlives_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    pids = tmp_path / "pids"
    write_rows(tmp_path / "rows", ["Hangs"])
    process = start(tmp_path, {}, environment={faulty_engine.PIDS: str(pids)}, loader=faulty_engine.load, grace_s=0.2)
    wait_until(lambda: pids.exists() and bool(pids.read_text()))
    time.sleep(0.3)
    engine = int(pids.read_text())
    assert is_alive(engine)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == (-9 if number == signal.SIGKILL else 75)
    wait_until(lambda: not is_alive(engine))


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Several engines


def test_several_engines_give_the_output_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = tmp_path / "pids"
    monkeypatch.setenv(faulty_engine.PIDS, str(pids))
    texts = [f"row {i} " + "x" * (i % 40) for i in range(400)]
    one = run(plan_of(tmp_path, texts), loader=faulty_engine.load)
    spread = plan_of(tmp_path, texts, name="three", parallelism=ParallelismConfig(dp=3))
    three = run(spread, loader=faulty_engine.load_slow)
    assert read_output(three.folder).equals(read_output(one.folder))
    assert len(set(pids.read_text().split())) == 4
    assert three.counts.num_output_tokens == one.counts.num_output_tokens
    shares = [int(path.read_text().split()[1]) for path in tmp_path.glob("pids.shares.*")]
    assert len(shares) == 3 and sum(shares) == 400 and min(shares) > 80, shares


def test_rows_of_an_engine_that_dies_go_to_the_others(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TEXTS, parallelism=ParallelismConfig(dp=2))
    summary = run(plan, loader=faulty_engine.load)
    table = read_output(summary.folder)
    assert summary.num_rows == 120 and without_errors(table) == [i for i in range(120) if i not in BAD]
    assert table.column("id").to_pylist() == list(range(120))


def test_threads_and_memory_are_shared_out() -> None:
    settings = EngineSettings("cpu", "x", "float32", Config(num_threads=8, kv_cache_bytes=100))
    first, *others = each_worker(settings, Layout(1, 4, 1), "cpu")
    assert isinstance(first.config, Config) and others == [first] * 3
    assert (first.config.num_threads, first.config.kv_cache_bytes) == (2, 25)
    assert each_worker(settings, Layout(1, 1, 1), "cpu") == [settings]
    ranks = each_worker(settings, Layout(2, 2, 1), "cpu")
    assert len(ranks) == 2 and ranks[0].config == first.config, "each of two ranks of two engines has a fourth"


def test_each_engine_has_accelerators_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EngineSettings("triton", "x", "bfloat16", Config(kv_cache_bytes=100), device="cuda", tp=2)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "3,4,5,6,7,8")
    each = each_worker(settings, Layout(2, 3, 1), "rocm")
    assert [made.environment for made in each] == [
        {"HIP_VISIBLE_DEVICES": "3,4"},
        {"HIP_VISIBLE_DEVICES": "5,6"},
        {"HIP_VISIBLE_DEVICES": "7,8"},
    ]
    assert all(made.config == settings.config for made in each), "memory is a device's own"
    assert each_worker(settings, Layout(1, 1, 1), "rocm") == [settings], "one device: whichever the job sees"
    assert visible_devices((2, 3), None) == "2,3"
    assert visible_devices((2, 3), "4, 5, 6, GPU-8a6") == "6,GPU-8a6"


def test_two_engines_take_half_the_time(tmp_path: Path) -> None:
    """Of an engine that waits more than it computes; starting it is counted."""
    texts = [f"row {i}" for i in range(320)]
    times = []
    for dp in (1, 2):
        plan = plan_of(tmp_path, texts, 8, name=f"dp{dp}", parallelism=ParallelismConfig(dp=dp), window_rows=1000)
        run(plan, loader=faulty_engine.load_sleepy)
        marks = [json.loads(line) for line in (tmp_path / "out" / f"dp{dp}" / "metrics.jsonl").read_text().splitlines()]
        times.append(marks[-1]["elapsed_s"])
    assert times[0] / times[1] > 1.3, times
