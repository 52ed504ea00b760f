"""A job that is killed at any instant, again and again, has the output of one that nothing happened to."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from runner.job import run
from runner.source import open_source
from runner.verify import verify
from tests.crash.child import start
from tests.fake_engine import FakeEngine
from tests.small_job import make_plan, read_output, write_rows

NUM_KILLS = 20
SLOW = {"per_step": 9, "step_s": 0.002}
JOB: dict[str, Any] = {
    "window_rows": 128,
    "dataset": {"chunk_rows": 60},
    "output": {"journal_interval_s": 0.01},
}


def check(folder: Path, undisturbed: Any) -> None:
    plan = make_plan(folder, **JOB)
    output = plan.output_folder
    assert read_output(output).equals(undisturbed)
    report = verify(output, open_source(plan.job.dataset))
    assert report.exit_code == 0, report.text()
    left = [path.name for name in ("staging", "journal") for path in (Path(output) / name).glob("*")]
    assert left == []


@pytest.mark.parametrize("seed", [1])
def test_killed_at_random_instants(tmp_path: Path, seed: int) -> None:
    """Killed and started again until it is done; then a new job, until there were enough kills."""
    texts = [None if i % 40 == 7 else f"row {i}" for i in range(900)]
    write_rows(tmp_path / "rows", texts[:500], texts[500:])
    undisturbed = read_output(run(make_plan(tmp_path, **JOB, name="undisturbed"), FakeEngine()).folder)
    assert undisturbed.column("id").to_pylist() == list(range(900))
    chance = random.Random(seed)
    kills = jobs = in_the_middle = 0
    while kills < NUM_KILLS:
        folder = tmp_path / f"job{jobs}"
        folder.mkdir()
        (folder / "rows").symlink_to(tmp_path / "rows")
        (folder / "model").symlink_to(tmp_path / "model")
        jobs += 1
        finished = False
        while not finished:
            process = start(folder, SLOW, **JOB)
            process.join(chance.uniform(0.1, 1.0) if kills < NUM_KILLS else 60)
            if process.exitcode is None:
                journal, parts = (folder / "out" / "job" / "journal", folder / "out" / "job" / "parts")
                process.kill()
                process.join()
                kills += 1
                state = [len(list(path.glob("*"))) for path in (journal, parts)]
                in_the_middle += bool(sum(state))
                print(f"seed {seed}, kill {kills} of job {jobs}: {state[0]} journals, {state[1]} parts")
            else:
                assert process.exitcode == 0
                finished = True
        table = undisturbed.set_column(0, "_file", read_output(folder / "out" / "job").column("_file"))
        check(folder, table)
    assert in_the_middle >= NUM_KILLS // 4


def test_what_was_journaled_is_not_done_again(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", [f"row {i}" for i in range(400)])
    process = start(tmp_path, {"per_step": 5, "step_s": 0.01}, output={"journal_interval_s": 0.01}, window_rows=400)
    journal = tmp_path / "out" / "job" / "journal"
    end = time.monotonic() + 30
    while time.monotonic() < end and sum(path.stat().st_size for path in journal.glob("*.journal")) < 20_000:
        assert process.exitcode is None
        time.sleep(0.01)
    process.kill()
    process.join()
    engine = FakeEngine()
    summary = run(make_plan(tmp_path), engine)
    assert summary.num_rows == 400 and engine.num_requests < 400
    assert read_output(summary.folder).column("id").to_pylist() == list(range(400))
