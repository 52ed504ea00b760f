"""The runner's own command through Ray, on this machine: the tasks share one job, and one of them is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.__main__ import command_line
from tests.conftest import ROOT
from tests.small_job import read_output

SHARDS = ["shard.sharing=leases", "shard.lease_s=5", "shard.count=2", "shard.index=range(2)"]
JOB = ["name=big", "dataset.limit=600", "dataset.chunk_rows=20", "window_rows=40"]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "runner", f"output.folder={folder}", *JOB, *more]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.Popen(command, cwd=folder.parent, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_tasks_share_a_job_and_one_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    alone = start(tmp_path / "alone")
    assert alone.communicate(timeout=580) and alone.returncode == 0
    sweep = start(tmp_path / "ray", "-m", "hydra/launcher=ray", *SHARDS)
    until = time.monotonic() + 300
    while len(list(tmp_path.glob("ray/big*/parts/*"))) < 2:
        assert sweep.poll() is None and time.monotonic() < until, sweep.communicate()
        time.sleep(0.05)
    (output,) = tmp_path.glob("ray/big*")
    holder = next(output.glob("leases/*.worker")).name
    pid = re.search(r"-(\d+)-[0-9a-f]{8}\.worker$", holder)
    assert pid is not None
    os.kill(int(pid[1]), signal.SIGKILL)
    message = sweep.communicate(timeout=580)[1]
    assert sweep.returncode == 0 and "2 of 2 jobs done" in message, message
    assert read_output(output).equals(read_output(tmp_path / "alone" / "big"))


def test_without_ray_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command_line(["-m", "hydra/launcher=ray", "mode=plan", f"output.folder={tmp_path}"]) == 2
    expected = (
        "hydra/launcher=ray: the package ray is not installed; expected batch-inference-runner[ray]; install it\n"
    )
    assert capsys.readouterr().err == expected
