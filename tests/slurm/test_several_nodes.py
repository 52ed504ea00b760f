"""One model over two nodes of a real Slurm: jobs/slurm/several_nodes.sbatch, with processors for GPUs."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines import discover
from tests.conftest import ROOT
from tests.parallel import cases
from tests.parity.checkpoints import make_checkpoint
from tests.slurm.cluster import Cluster, missing, wait_for
from tests.small_job import read_output, write_rows, write_tokenizer

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing() or "-"), pytest.mark.slow]
SCRIPT = ROOT / "jobs" / "slurm" / "several_nodes.sbatch"
NUM_ROWS = 40


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # where munge's socket may be
    cluster = Cluster(folder / "cluster")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of the runner, for a job in tmp_path/out."""
    family, sizes = cases.SIZES["gqa"]
    make_checkpoint(discover.families()[family].tiny_config() | sizes | {"vocab_size": 256}, tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    write_rows(tmp_path / "rows", [f"row {i}" for i in range(NUM_ROWS)])
    (tmp_path / "runner").write_text(f'#!/bin/sh\nexec {sys.executable} -m runner "$@"\n')
    (tmp_path / "runner").chmod(0o755)
    fixed = ["backend=cpu", "model.dtype=float32", "model.max_model_len=64", "sampling.max_tokens=8", "task=generate"]
    fixed += ["task.prompt='{{text}}'", "backend_config.kv_cache_bytes=4000000", "dataset.chunk_rows=4"]
    paths = [f"model.path={tmp_path}/model", f"dataset.path={tmp_path}/rows", f"output.folder={tmp_path}/out"]
    return ["model=local", "dataset=local", *paths, *fixed]


def submit(cluster: Cluster, folder: Path, name: str, arguments: list[str], num_tasks: int) -> str:
    return cluster.submit(
        SCRIPT,
        f"name={name}",
        *arguments,
        options=(f"--nodes={min(num_tasks, 2)}", "--ntasks-per-node=1", f"--output={folder}/log"),
        RUNNER=f"{folder}/runner",
        PYTHONPATH=str(ROOT),
        MASTER_ADDR="127.0.0.1",  # names of nodes are none of hosts here
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )


def test_two_nodes_and_one_give_the_same(cluster: Cluster, arguments: list[str], tmp_path: Path) -> None:
    for name, tasks in (("two", 2), ("one", 1)):
        job = submit(
            cluster, tmp_path, name, [*arguments, *(["parallelism.launch=spawn"] if tasks == 1 else [])], tasks
        )
        cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", seconds=400)
        assert cluster.states(job) == {"COMPLETED"}, (tmp_path / "log").read_text()
    two, one = (read_output(tmp_path / "out" / name) for name in ("two", "one"))
    assert two.num_rows == NUM_ROWS and two.equals(one)


def test_requeued_in_the_middle(cluster: Cluster, arguments: list[str], tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "two", [*arguments, "window_rows=4", "sampling.ignore_eos=true"], 2)
    wait_for("part", lambda: any((tmp_path / "out" / "two").glob("parts/*")), 300)
    cluster.run("scontrol", "requeue", job)
    cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=400)
    assert cluster.states(job) == {"COMPLETED"}, (tmp_path / "log").read_text()
    table = read_output(tmp_path / "out" / "two")
    assert table.num_rows == NUM_ROWS and table.column("error_code").null_count == NUM_ROWS
