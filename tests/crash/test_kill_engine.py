"""Kills of a job with a real engine, and of the engine alone: text as if nothing had happened, drawn tokens too."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from engines import discover
from engines.api import SamplingParams
from runner import engine_main
from runner.job import run
from tests.crash.child import start
from tests.crash.test_kill import JOB, check, state_of
from tests.fake_engine import FakeEngine
from tests.parity.checkpoints import make_checkpoint
from tests.small_job import make_plan, read_output, write_rows, write_tokenizer

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, top_p=0.9)
NUM_ROWS = 1500


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny real model and rows of different lengths, some of them null."""
    folder = tmp_path_factory.mktemp("template")
    make_checkpoint({**discover.families()["llama"].tiny_config(), "vocab_size": 256}, folder / "model")
    write_tokenizer(folder / "model")
    chance = random.Random(0)
    texts = [None if i % 40 == 7 else f"row {i} " + "word " * chance.randrange(8) for i in range(NUM_ROWS)]
    write_rows(folder / "rows", texts[:700], texts[700:])
    return folder


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_killed_with_a_real_engine(tmp_path: Path, template: Path, sampling: SamplingParams, seed: int) -> None:
    for name in ("rows", "model"):
        (tmp_path / name).symlink_to(template / name)
    options: dict[str, Any] = {**JOB, "sampling": sampling, "samples": 1 if sampling is GREEDY else 2}
    undisturbed = read_output(run(make_plan(tmp_path, **options, name="undisturbed")).folder)
    assert undisturbed.num_rows == NUM_ROWS and undisturbed.column("text").null_count == NUM_ROWS // 40 + 1
    chance = random.Random(seed)
    output = tmp_path / "out" / "job"
    kills = {"job": 0, "engine": 0}
    while True:
        process = start(tmp_path, {}, loader=engine_main.load, **options)
        victim = chance.choice(["job", "engine"])
        if sum(kills.values()) < 4:
            wait_for_rows(process, output)
            time.sleep(chance.uniform(0, 0.1))
            pids = [process.pid] if victim == "job" else engines_of(process.pid)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                kills[victim] += 1
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
    assert sum(kills.values()) >= 1, "it was done before it could be killed"
    check(tmp_path, undisturbed)
    again = FakeEngine()
    assert run(make_plan(tmp_path, **options), again).finished and again.num_requests == 0


def wait_for_rows(process: Any, output: Path) -> None:
    """Until this process has brought rows of its own to the disk."""
    before, end = state_of(output), time.monotonic() + 60
    while process.exitcode is None and state_of(output) == before and time.monotonic() < end:
        time.sleep(0.002)


def engines_of(pid: int) -> list[int]:
    """The processes that a job has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return [child for child in found if "engine_main" in Path(f"/proc/{child}/cmdline").read_text()]


def test_an_attempt_that_wakes_up_late_changes_nothing(tmp_path: Path) -> None:
    """It was stopped half way, another one finished the job, and then it goes on from where it was."""
    write_rows(tmp_path / "rows", [f"row {i}" for i in range(600)])
    stale = start(tmp_path, {"per_step": 9, "step_s": 0.005}, **JOB)
    output = tmp_path / "out" / "job"
    while len(list(output.glob("parts/*"))) < 2:
        assert stale.exitcode is None
        time.sleep(0.005)
    os.kill(stale.pid, signal.SIGSTOP)
    assert run(make_plan(tmp_path, **JOB), FakeEngine()).finished
    before = {path.name: path.read_bytes() for path in (output / "parts").glob("*")}
    os.kill(stale.pid, signal.SIGCONT)
    stale.join(60)
    assert stale.exitcode is not None
    assert {path.name: path.read_bytes() for path in (output / "parts").glob("*")} == before
    check(tmp_path, read_output(output))
    assert read_output(output).column("id").to_pylist() == list(range(600))
