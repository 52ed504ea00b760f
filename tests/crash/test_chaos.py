"""Four workers share a folder by leases while they are killed, stopped and woken at random; the output is that of one.

A stopped worker sleeps longer than its lease: others take its chunks, and it wakes up believing in them.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from runner.config import ShardConfig
from runner.job import run
from runner.leases import WORKER_SUFFIX
from tests.crash.child import start
from tests.crash.test_kill import JOB, check, check_visible, identities_of
from tests.fake_engine import FakeEngine
from tests.small_job import make_plan, read_output, write_rows

NUM_WORKERS = 4
LEASE_S = 0.5
BLOWS = ("stop", "kill", "stop", "term")
CHAOS_SEED = int(os.environ.get("CHAOS_SEED", "1"))
"""CHAOS_SEED=7 strikes others at other times."""


class Crew:
    """Workers of one job; one that is dead is replaced, as a scheduler would."""

    def __init__(self, folder: Path, chance: random.Random, step_s: float) -> None:
        self.folder, self.chance, self.step_s = folder, chance, step_s
        self.workers = [self._start(index) for index in range(NUM_WORKERS)]
        self.asleep: dict[int, float] = {}
        """When each stopped worker is to be woken."""
        self.blows: Counter[str] = Counter()
        self.taken_over: set[str] = set()
        """Leases of a second turn or a later one."""

    def _start(self, index: int) -> BaseProcess:
        shard = ShardConfig(index, NUM_WORKERS, "leases", LEASE_S)
        return start(self.folder, {"per_step": 6, "step_s": self.step_s}, shard=shard, **JOB)

    def strike(self) -> None:
        """One blow to one worker that is awake."""
        index = self.chance.choice([index for index in range(NUM_WORKERS) if index not in self.asleep])
        worker = self.workers[index]
        blow = BLOWS[self.blows.total() % len(BLOWS)]
        assert worker.pid is not None
        if worker.exitcode is None:
            self.blows[blow] += 1
            if blow == "stop":
                os.kill(worker.pid, signal.SIGSTOP)
                self.asleep[index] = time.monotonic() + self.chance.uniform(1, 6) * LEASE_S
            else:
                os.kill(worker.pid, signal.SIGKILL if blow == "kill" else signal.SIGTERM)
                worker.join(60)
                assert worker.exitcode in (0, 75, -signal.SIGKILL, -signal.SIGTERM)

    def tend(self) -> None:
        """Wake those who slept long enough, replace the dead."""
        leases = (self.folder / "out" / "job" / "leases").glob("*")
        self.taken_over |= {path.name for path in leases if path.suffix not in (".0", WORKER_SUFFIX)}
        for index, until in list(self.asleep.items()):
            if time.monotonic() >= until:
                self._wake(index)
        for index, worker in enumerate(self.workers):
            if worker.exitcode is not None and worker.exitcode != 0:
                assert worker.exitcode in (75, -signal.SIGKILL, -signal.SIGTERM), (self.folder / "message").read_text()
                self.workers[index] = self._start(index)

    def _wake(self, index: int) -> None:
        del self.asleep[index]
        pid = self.workers[index].pid
        assert pid is not None
        os.kill(pid, signal.SIGCONT)

    @property
    def working(self) -> bool:
        return all(worker.exitcode != 0 for worker in self.workers)

    def finish(self) -> None:
        """Everybody awake, until all have found that nothing is left."""
        while any(worker.exitcode != 0 for worker in self.workers):
            for index in list(self.asleep):
                self._wake(index)
            self.tend()
            time.sleep(0.02)


@pytest.mark.parametrize("num_blows", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_four_workers_under_blows(tmp_path: Path, num_blows: int) -> None:
    """New jobs until there were enough blows."""
    texts = [None if i % 40 == 7 else f"row {i}" for i in range(1800)]
    write_rows(tmp_path / "rows", texts[:1000], texts[1000:])
    undisturbed = read_output(run(make_plan(tmp_path, **JOB, name="undisturbed"), FakeEngine()).folder)
    chance = random.Random(CHAOS_SEED)
    blows: Counter[str] = Counter()
    jobs = taken_over = 0
    while blows.total() < num_blows:
        folder = tmp_path / f"job{jobs}"
        folder.mkdir()
        for name in ("rows", "model"):
            (folder / name).symlink_to(tmp_path / name)
        jobs += 1
        parts = folder / "out" / "job" / "parts"
        crew = Crew(folder, chance, step_s=0.05)
        while crew.working and (blows + crew.blows).total() < num_blows:
            time.sleep(chance.uniform(0.1, 0.6))
            if parts.exists() and len(crew.asleep) < NUM_WORKERS - 1:
                crew.strike()
                check_visible(parts, identities_of(undisturbed, folder), crew.blows.total())
            crew.tend()
        crew.finish()
        blows += crew.blows
        taken_over += len(crew.taken_over)
        print(f"CHAOS_SEED={CHAOS_SEED}, job {jobs}: {dict(crew.blows)}, {len(crew.taken_over)} chunks taken over")
        check(folder, undisturbed.set_column(0, "_file", read_output(folder / "out" / "job").column("_file")))
        left = [path.name for path in (folder / "out" / "job" / "leases").glob("*")]
        assert all(name.endswith(WORKER_SUFFIX) for name in left)
        again = FakeEngine()
        assert run(make_plan(folder, **JOB), again).finished and again.num_requests == 0
    assert set(blows) == set(BLOWS) and taken_over
