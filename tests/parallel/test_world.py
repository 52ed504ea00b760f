"""Ranks that were started from outside: what the environment says, and a job of two such processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engines import discover
from engines.parallel.world import World, first_host, world
from runner.config import ParallelismConfig
from runner.errors import ConfigError
from runner.parallel import own_rank
from tests.conftest import ROOT
from tests.parallel import cases
from tests.parity.checkpoints import make_checkpoint
from tests.small_job import make_plan, read_output, write_rows, write_tokenizer

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-05,09],x1",
}  # fmt: skip


def test_what_the_environment_says() -> None:
    assert world("torchrun", TORCHRUN) == World(1, 2, 1, "10.0.0.7", 29500)
    here = world("srun", SRUN)
    assert (here.rank, here.size, here.local_rank, here.address) == (5, 8, 1, "gpu03")
    assert here.port != world("srun", {**SRUN, "SLURM_STEP_ID": "1"}).port
    elsewhere = world("srun", SRUN | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "999"})
    assert (elsewhere.address, elsewhere.port) == ("10.0.0.9", 999)
    with pytest.raises(ValueError, match=r"launch: srun, and SLURM_NTASKS is not set; expected a process that srun"):
        world("srun", {k: v for k, v in SRUN.items() if k != "SLURM_NTASKS"})
    with pytest.raises(ValueError, match=r"launch: torchrun: .*'two'"):
        world("torchrun", {**TORCHRUN, "WORLD_SIZE": "two"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-05,09],x1", "gpu03"),
        ("gpu[7]", "gpu7"),
        ("a[1-2]-ib,b", "a1-ib"),
        ("localhost", "localhost"),
    ],
)
def test_the_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_as_many_processes_as_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    job = make_plan(tmp_path, parallelism=ParallelismConfig(tp=4, launch="torchrun")).job
    with pytest.raises(ConfigError, match=r"torchrun has started 2 processes; expected tp \* dp = 4 \* 1 = 4, one"):
        own_rank(job)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert own_rank(job) == 1


@pytest.mark.parametrize(
    ("kind", "sizes_of_two"),
    [("gqa", ("tp=2",)), pytest.param("moe", ("dp=2", "ep=2"), marks=pytest.mark.slow)],  # the latter: copies
)
def test_two_processes_do_one_job(kind: str, sizes_of_two: tuple[str, ...], tmp_path: Path) -> None:
    family, sizes = cases.SIZES[kind]
    make_checkpoint(discover.families()[family].tiny_config() | sizes | {"vocab_size": 256}, tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    write_rows(tmp_path / "rows", [f"row {i}" for i in range(12)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "runner", "model=local", f"model.path={tmp_path}/model", "dataset=local"]
    command += [
        f"dataset.path={tmp_path}/rows",
        f"output.folder={tmp_path}/out",
        "backend=cpu",
        "sampling.max_tokens=8",
    ]
    command += ["task=generate", "task.prompt='{{text}}'", "model.dtype=float32", "model.max_model_len=64"]

    def start(name: str, rank: int, size: int) -> subprocess.Popen[str]:
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
        environment = {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        own = [*command, f"name={name}"]
        if size > 1:
            own += ["parallelism.launch=torchrun", *(f"parallelism.{spread}" for spread in sizes_of_two)]
        return subprocess.Popen(own, cwd=tmp_path, env=environment, stdout=-1, stderr=-2, text=True)

    processes = [start("two", rank, 2) for rank in range(2)]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    one = start("one", 0, 1)
    assert (one.communicate(timeout=240), one.returncode)[1] == 0
    assert read_output(tmp_path / "out" / "two").equals(read_output(tmp_path / "out" / "one"))
