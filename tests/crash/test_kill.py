"""A job that is killed at any instant, again and again, has the output of one that nothing happened to."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from runner.job import run
from runner.source import open_source
from runner.verify import verify
from tests.crash.child import start
from tests.crash.readers import READERS
from tests.fake_engine import FakeEngine
from tests.small_job import make_plan, read_output, write_rows

SEEDS = [int(os.environ["KILL_SEED"])] if "KILL_SEED" in os.environ else list(range(1, 11))
"""KILL_SEED=7 repeats one of them."""
NUM_KILLS = 30
SLOW = {"per_step": 9, "step_s": 0.002}
IN_FLIGHT = 128
JOB: dict[str, Any] = {
    "window_rows": IN_FLIGHT,
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


def check_visible(parts: Path, identities: set[tuple[str, int]], turn: int) -> None:
    """Whoever opens the folder now sees rows of the input, none twice. One reader each time, all of them in turn."""
    if parts.exists() and any(parts.iterdir()):
        rows = READERS[turn % len(READERS)](parts)
        assert len(rows) == len(set(rows))
        assert set(rows) <= identities


def identities_of(table: pa.Table, folder: Path) -> set[tuple[str, int]]:
    files = [Path(file).name for file in table.column("_file").to_pylist()]
    return {
        (str(folder / "rows" / file), row) for file, row in zip(files, table.column("_row").to_pylist(), strict=True)
    }


@pytest.mark.parametrize("seed", [SEEDS[0], *(pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS[1:])])
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
        output = folder / "out" / "job"
        table = None
        while True:
            process = start(folder, SLOW, **JOB)
            if kills < NUM_KILLS:
                wait_for_work(process, output)
                process.join(chance.uniform(0.0, 0.12))
            else:
                process.join(120)
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
            state = [len(list((output / name).glob("*"))) for name in ("journal", "parts")]
            in_the_middle += bool(sum(state))
            print(f"KILL_SEED={seed}, kill {kills} of job {jobs}: {state[0]} journals, {state[1]} parts")
            check_visible(output / "parts", identities_of(undisturbed, folder), kills)
        table = undisturbed.set_column(0, "_file", read_output(output).column("_file"))
        check(folder, table)
        for reader in READERS:
            assert sorted(reader(output / "parts")) == sorted(identities_of(undisturbed, folder))
        again = FakeEngine()
        assert run(make_plan(folder, **JOB), again).finished and again.num_requests == 0
    assert in_the_middle >= NUM_KILLS // 2


def wait_for_work(process: Any, output: Path) -> None:
    """Until this process has written something of its own, or has ended."""
    before = state_of(output)
    end = time.monotonic() + 60
    while process.exitcode is None and state_of(output) == before and time.monotonic() < end:
        time.sleep(0.002)


def state_of(output: Path) -> list[tuple[str, int]]:
    found = []
    for file in sorted((*output.glob("journal/*"), *output.glob("ledger/*"))):
        try:
            found.append((file.name, file.stat().st_size))
        except FileNotFoundError:
            continue
    return found


def test_what_was_journaled_is_not_done_again(tmp_path: Path) -> None:
    """Repeated work is at most the rows that were in flight and those of the last journal interval."""
    write_rows(tmp_path / "rows", [f"row {i}" for i in range(400)])
    job: dict[str, Any] = {"output": {"journal_interval_s": 0.01}, "window_rows": 40}
    process = start(tmp_path, {"per_step": 5, "step_s": 0.01}, **job)
    output = tmp_path / "out" / "job"
    end = time.monotonic() + 60
    while time.monotonic() < end and len(list(output.glob("parts/*"))) < 2:
        assert process.exitcode is None
        time.sleep(0.01)
    process.kill()
    process.join()
    committed = read_output(output).num_rows
    engine = FakeEngine()
    summary = run(make_plan(tmp_path, **job), engine)
    assert summary.num_rows == 400 and engine.num_requests < 400
    assert committed >= 200 and engine.num_requests <= 400 - committed
    assert read_output(summary.folder).column("id").to_pylist() == list(range(400))


def test_two_jobs_started_at_once_on_one_folder(tmp_path: Path) -> None:
    """They share the work or do it twice, but the output is that of one."""
    write_rows(tmp_path / "rows", [f"row {i}" for i in range(600)])
    undisturbed = read_output(run(make_plan(tmp_path, **JOB, name="undisturbed"), FakeEngine()).folder)
    both = [start(tmp_path, SLOW, **JOB) for _ in range(2)]
    for process in both:
        process.join(120)
    assert 0 in [process.exitcode for process in both]
    run(make_plan(tmp_path, **JOB), FakeEngine())
    check(tmp_path, undisturbed)


def test_another_job_in_the_same_folder_is_refused_and_may_have_a_sibling(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", [f"row {i}" for i in range(100)])
    first = start(tmp_path, {"per_step": 5, "step_s": 0.01}, **JOB)
    wait_for_work(first, tmp_path / "out" / "job")
    other = start(tmp_path, {}, **{**JOB, "dataset": {"chunk_rows": 60, "limit": 50}})
    other.join(120)
    assert other.exitcode == 4
    beside = start(tmp_path, {}, **{**JOB, "dataset": {"chunk_rows": 60, "limit": 50}}, on_change="new")
    beside.join(120)
    first.join(120)
    assert (first.exitcode, beside.exitcode) == (0, 0)
    assert read_output(tmp_path / "out" / "job").num_rows == 100
    assert read_output(tmp_path / "out" / "job-2").num_rows == 50
