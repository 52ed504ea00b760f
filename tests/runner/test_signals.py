"""Signals: the job keeps what is finished and leaves in time with exit code 75."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runner.errors import Interrupted
from runner.job import run
from runner.stop import SIGNALS
from tests.crash.child import start
from tests.fake_engine import FakeEngine
from tests.small_job import make_plan, read_output, write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows", [f"row {i}" for i in range(400)])
    return tmp_path


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_keeps_what_is_finished(folder: Path, number: signal.Signals) -> None:
    engine = FakeEngine(per_step=10)
    steps = iter(range(1000))
    engine.on_step = lambda: os.kill(os.getpid(), number) if next(steps) == 4 else None
    before = [signal.getsignal(one) for one in SIGNALS]
    plan = make_plan(folder, output={"journal_interval_s": 1000.0})
    with pytest.raises(Interrupted, match=f"stopped by {number.name}; finished rows are kept; run the same") as caught:
        run(plan, engine)
    assert caught.value.signal == number and caught.value.exit_code == 75
    assert [signal.getsignal(one) for one in SIGNALS] == before
    again = FakeEngine()
    summary = run(plan, again)
    assert again.num_requests == 400 - 50
    assert read_output(summary.folder).column("id").to_pylist() == list(range(400))


def test_a_signal_at_the_last_step_does_not_take_the_end_away(folder: Path) -> None:
    engine = FakeEngine()
    engine.on_step = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert run(make_plan(folder, window_rows=10_000), engine).finished


def test_the_process_leaves_after_the_grace_time_whatever_the_engine_does(folder: Path) -> None:
    process = _hanging(folder, grace_s=0.3)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 75 and 0.25 < time.monotonic() - began < 10


def test_a_second_ctrl_c_leaves_at_once(folder: Path) -> None:
    process = _hanging(folder, grace_s=60.0)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert process.exitcode is None
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 75 and time.monotonic() - began < 10


@pytest.mark.parametrize("heeded", ["os.kill(os.getpid(), signal.SIGTERM)", "stop_a_job()"])
def test_a_signal_that_no_job_heeds_is_exit_code_75_too(heeded: str) -> None:
    """Before there is a job, and a second one after it."""
    script = f"""
import os, signal, time
from types import SimpleNamespace
import runner.__main__ as cli
from runner.stop import Stop

def stop_a_job():
    with Stop(SimpleNamespace(grace_s=60.0, max_runtime_s=None), 0.0):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)

cli.command_line = lambda arguments: {heeded}
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 75
    assert done.stderr == "stopped by SIGTERM; run the same command again to go on\n"


def _hanging(folder: Path, **changes: Any) -> Any:
    """A process whose engine is in its first step, for a minute."""
    process = start(folder, {"step_s": 60.0}, **changes)
    plan = folder / "out" / "job" / "plan.json"
    end = time.monotonic() + 30
    while time.monotonic() < end and not plan.exists():
        assert process.exitcode is None
        time.sleep(0.02)
    time.sleep(0.5)
    return process
