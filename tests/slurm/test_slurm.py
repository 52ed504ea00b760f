"""Jobs under a real Slurm, which these tests start and stop: scheduled, at their limit, requeued, cancelled, drained.

After each, every row is there once and as from one process that nothing happened to.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.job import run
from runner.source import open_source
from runner.verify import verify
from tests.conftest import ROOT
from tests.fake_engine import FakeEngine
from tests.slurm.cluster import Cluster, missing, wait_for
from tests.slurm.stand_in import JOB
from tests.small_job import make_plan, read_output, write_rows

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")
NUM_ROWS = 1200
ONE_NODE, ARRAY, NIGHTLY = (ROOT / "jobs" / "slurm" / f"{name}.sbatch" for name in ("one_node", "array", "nightly"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # munge wants its socket where everybody may go, which pytest's folders are not.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder / "cluster")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


class Job:
    """A job of 1,200 rows in 20 chunks, to be run by the stand-in."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.output = cluster, folder, folder / "out" / "job"
        texts = [None if i % 40 == 7 else f"row {i}" for i in range(NUM_ROWS)]
        write_rows(folder / "rows", texts[:500], texts[500:])
        self.whole = read_output(run(make_plan(folder, **JOB, name="whole"), FakeEngine()).folder)
        self.runner = folder / "runner"
        self.runner.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.slurm.stand_in "$@"\n')
        self.runner.chmod(0o755)
        self.log = folder / "log"

    def submit(self, script: Path, *arguments: str, seconds: float, options: tuple[str, ...] = ()) -> str:
        """The job's number. seconds: that the engine takes for all of it."""
        return self.cluster.submit(
            script,
            *arguments,
            options=(f"--output={self.log}", *options),
            RUNNER=str(self.runner),
            PYTHONPATH=str(ROOT),
            STAND_IN_FOLDER=str(self.folder),
            STAND_IN_STEP_S=str(seconds / NUM_ROWS * 5),
        )

    def wait_for_work(self) -> None:
        wait_for("part", lambda: any(self.output.glob("parts/*")), 120)

    def check(self) -> None:
        assert read_output(self.output).equals(self.whole), self.log.read_text()
        report = verify(str(self.output), open_source(make_plan(self.folder, **JOB).job.dataset))
        assert report.exit_code == 0, report.text()
        assert not [path for name in ("staging", "journal") for path in (self.output / name).glob("*")]


@pytest.fixture
def job(cluster: Cluster, tmp_path: Path) -> Job:
    return Job(cluster, tmp_path)


def test_a_single_job(cluster: Cluster, job: Job) -> None:
    number = job.submit(ONE_NODE, seconds=0.5)
    cluster.wait(number, "COMPLETED")
    job.check()


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["leases", "fixed"])
def test_an_array_of_four(cluster: Cluster, job: Job, sharing: str) -> None:
    number = job.submit(ARRAY, f"shard.sharing={sharing}", seconds=20)
    cluster.wait(number, "COMPLETED")
    job.check()


@pytest.mark.slow
def test_a_time_limit_again_and_again(cluster: Cluster, job: Job) -> None:
    """Slurm's limits are whole minutes; it sends the signal at any time of the last one."""
    number = job.submit(ONE_NODE, seconds=75, options=("--time=1", "--signal=USR1@5"))
    cluster.wait(number, "COMPLETED", seconds=900)
    assert cluster.restarts(number) >= 1
    assert "SIGUSR1" in job.log.read_text()
    job.check()


@pytest.mark.slow
def test_requeued_in_the_middle(cluster: Cluster, job: Job) -> None:
    number = job.submit(ONE_NODE, seconds=20)
    job.wait_for_work()
    cluster.run("scontrol", "requeue", number)
    wait_for("restart", lambda: cluster.restarts(number) == 1, 60)
    cluster.wait(number, "COMPLETED")
    assert "SIGTERM" in job.log.read_text()
    job.check()


@pytest.mark.slow
def test_cancelled_in_the_middle(cluster: Cluster, job: Job) -> None:
    """It stays cancelled, and whoever submits it again has it go on."""
    number = job.submit(ONE_NODE, seconds=20)
    job.wait_for_work()
    cluster.run("scancel", number)
    cluster.wait(number, "CANCELLED")
    wait_for("end", lambda: "SIGTERM" in job.log.read_text(), 60)
    assert cluster.restarts(number) == 0
    rows = read_output(job.output).num_rows
    assert 0 < rows < NUM_ROWS
    again = job.submit(ONE_NODE, seconds=5)
    cluster.wait(again, "COMPLETED")
    assert cluster.states(number) == {"CANCELLED"}
    job.check()


@pytest.mark.slow
def test_a_task_of_an_array_is_requeued_and_another_cancelled(cluster: Cluster, job: Job) -> None:
    """With leases, the others do what the cancelled one has left."""
    number = job.submit(ARRAY, seconds=15)
    job.wait_for_work()
    cluster.run("scontrol", "requeue", f"{number}_1")
    cluster.run("scancel", f"{number}_2")
    cluster.wait(number, "COMPLETED", "CANCELLED")
    assert sorted(cluster.field(number, "JobState")).count("COMPLETED") == 3
    job.check()


@pytest.mark.slow
def test_preempted_by_a_job_that_goes_first(cluster: Cluster, job: Job, tmp_path: Path) -> None:
    """It leaves in the time of grace, and goes on when the other is done."""
    number = job.submit(ONE_NODE, seconds=15, options=("--exclusive",))
    job.wait_for_work()
    urgent = tmp_path / "urgent.sbatch"
    urgent.write_text("#!/bin/sh\nsleep 2\n")
    first = cluster.submit(
        urgent, options=("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/first")
    )
    cluster.wait(first, "COMPLETED")
    cluster.wait(number, "COMPLETED")
    assert cluster.restarts(number) == 1 and "SIGTERM" in job.log.read_text()
    job.check()


@pytest.mark.slow
def test_a_node_is_drained_under_a_job(cluster: Cluster, job: Job) -> None:
    """A drained node lets its job end; requeued, it goes on on another one."""
    number = job.submit(ONE_NODE, seconds=15)
    job.wait_for_work()
    node = cluster.field(number, "NodeList")[0]
    cluster.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    try:
        cluster.run("scontrol", "requeue", number)
        cluster.wait(number, "COMPLETED")
        assert cluster.field(number, "NodeList")[0] != node
    finally:
        cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
    job.check()


@pytest.mark.slow
def test_a_night_of_several_days(cluster: Cluster, tmp_path: Path) -> None:
    """Each day has an output folder; a day that is done is left alone."""
    calls = tmp_path / "calls"
    runner = tmp_path / "runner"
    runner.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncase "$1" in name=day-2) exit 3;; esac\n')
    runner.chmod(0o755)
    for day in ("day-1", "day-2", "day-3"):
        (tmp_path / "incoming" / day).mkdir(parents=True)
    (tmp_path / "outputs" / "day-1").mkdir(parents=True)
    (tmp_path / "outputs" / "day-1" / "_SUCCESS").touch()
    folders = {"INCOMING": str(tmp_path / "incoming"), "OUTPUTS": str(tmp_path / "outputs")}
    number = cluster.submit(NIGHTLY, "task=embed", options=(f"--output={tmp_path}/log",), RUNNER=str(runner), **folders)
    cluster.wait(number, "FAILED")
    lines = calls.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["name=day-2", "name=day-3"]
    assert lines[1].split()[1:] == [
        f"dataset.path={tmp_path}/incoming/day-3/", f"output.folder={tmp_path}/outputs", "task=embed",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_sweep_through_the_launcher(cluster: Cluster, tmp_path: Path) -> None:
    """The runner's own command with the demo model: two jobs as in this process, one of them told to make room."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    common = [
        "dataset.limit=600",
        "dataset.chunk_rows=20",
        "window_rows=40",
        "sampling.temperature=0,0.7",
        "name=sweep",
    ]
    launcher = ["hydra/launcher=slurm", "hydra.launcher.timeout_min=20", "hydra.launcher.cpus_per_task=1"]
    env = {**cluster.env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(folder: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "runner", "-m", f"output.folder={tmp_path}/{folder}", *common, *more]
        return subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)

    alone = start("alone")
    assert "2 of 2 jobs done" in alone.communicate(timeout=580)[1]
    sweep = start("slurm", *launcher)
    wait_for("part", lambda: any(tmp_path.glob("slurm/sweep*/parts/*")) or sweep.poll() is not None, 300)
    job = cluster.run("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%i").split()[0]
    cluster.run("scancel", "--signal=USR2", job)
    wait_for("restart", lambda: cluster.restarts(job) == 1, 120)
    assert "2 of 2 jobs done" in sweep.communicate(timeout=580)[1]
    jobs = [sorted(path.name for path in (tmp_path / name).glob("sweep*")) for name in ("alone", "slurm")]
    assert jobs[0] == jobs[1] and len(jobs[0]) == 2
    for name in jobs[0]:
        assert read_output(tmp_path / "slurm" / name).equals(read_output(tmp_path / "alone" / name))
