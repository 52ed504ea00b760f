"""`python -m tests.gpu` as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.api import Outcome
from engines.cuda.opset import OpSet as CudaOps
from engines.gpu_ledger import FILE as LEDGER
from engines.parallel.place import Place
from tests.csrc.cuda import emulated
from tests.engines.triton.kernels import KERNELS
from tests.gpu import __main__ as gpu
from tests.gpu import devices, first, models, parts
from tests.gpu.__main__ import FOLDERS, ROOT, entry, one
from tests.gpu.first import Copying
from tests.gpu.timing import SMALL, Kernel, decoder
from tests.parallel.cases import ThreadGroup, Threads


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_under_the_interpreter() -> None:
    before = LEDGER.read_bytes()
    done = run("--interpret", "--only", "write_kv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"(\d\d) of \1 cases hold", done.stdout)
    assert "write_kv 8192" in done.stdout
    assert LEDGER.read_bytes() == before, "a run on a processor wrote the ledger"


def test_what_the_deadline_leaves_out_is_a_failure() -> None:
    done = run("--interpret", "--only", "write_kv", "--seconds", "0")
    assert done.returncode == 1
    assert "triton, check: left out, no time" in done.stdout
    found = parts.check(parts.Asked("triton", "cpu", "write_kv", 0.0, False))
    assert found.failed and found.lines == ["0 of 24 cases hold"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout.startswith("no GPU: torch.cuda.is_available() is False")


@pytest.mark.slow
def test_engines_are_timed() -> None:
    """Small, on the processor; transformers' continuous batching too."""
    done = run("--interpret", "--parts", "decode", "requests", "--seconds", "3000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "decode step of 8B, batch 2" in done.stdout and "host time of a decode step of 8B" in done.stdout
    assert "6 requests of 8B" in done.stdout and "transformers' continuous batching: " in done.stdout


def test_a_part_that_dies_or_hangs_costs_that_part() -> None:
    died = one("check", "no such backend", "cpu", "", 60.0)
    assert died["failed"] and died["lines"][0] == "ended with status 1"
    hung = one("check", "triton", "cpu", "", 0.05)
    assert hung["failed"] and hung["lines"] == ["ended after its 0 s"]


def test_what_a_part_has_found_is_kept_when_it_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child"
    program = tmp_path / "part"
    program.write_text(
        f"#!{sys.executable}\nimport pathlib, subprocess, sys, time\n"
        "from tests.gpu.parts import Asked, Result\n"
        "file = pathlib.Path(sys.argv[-1])\n"
        "Asked('triton', 'cpu', '', 0.0, False, file).save(Result(['3 of 4 hold'], errors={'rope': 0.5}))\n"
        f"pathlib.Path({str(child)!r}).write_text(str(subprocess.Popen(['sleep', '60']).pid))\ntime.sleep(60)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = one("check", "triton", "cpu", "", 3.0)
    assert found["failed"] and found["lines"] == ["3 of 4 hold", "ended after its 3 s"]
    assert found["errors"] == {"rope": 0.5}
    deadline = time.time() + 10
    state = Path(f"/proc/{child.read_text()}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.time() < deadline, "what the part had started goes on"
        time.sleep(0.05)


@pytest.mark.parametrize("family", ("llama", "bert"))
def test_families_are_compared(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU engine in the place of a GPU's; then one with a wrong token, or a wrong number."""
    assert models.run(family, tmp_path, "cpu", "cpu").worst <= 1
    finished = models.finished

    def wrong(*given: Any) -> tuple[list[Outcome], tuple[str, ...]]:
        outcomes, notes = finished(*given)
        if outcomes[3].values is None:
            outcomes[3].token_ids[2] = (outcomes[3].token_ids[2] + 1) % 60
        else:
            outcomes[3].values[5] += 0.01 * (len(calls) == 0)
        calls.append(notes)
        return outcomes, notes

    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(models, "finished", wrong)
    with pytest.raises(AssertionError):
        models.run(family, tmp_path, "cpu", "cpu")


def test_the_sanitizer_is_run_on_one_case_of_each_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the program: runs what it is given, and sums up as compute-sanitizer does."""
    program = tmp_path / parts.SANITIZER
    asked = parts.Asked("triton", "cpu", "write_kv", time.time() + 100, False)
    for errors in (0, 3):
        program.write_text(
            '#!/bin/sh\nwhile [ $1 != --error-exitcode ]; do shift; done\nshift 2\n"$@"\n'
            f"echo ========= ERROR SUMMARY: {errors} errors\nexit {86 if errors else 0}\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(parts, "_paths", lambda: [str(tmp_path)])
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        found = parts.sanitizer(asked)
        assert found.failed is (errors > 0), found.lines
        counted = re.fullmatch(r"compute-sanitizer: (\d+) of (\d+) cases hold", found.lines[0])
        assert counted is not None and 3 <= int(counted[1]) == int(counted[2]) <= 10, found.lines
        assert found.lines[1] == f"compute-sanitizer: ERROR SUMMARY: {errors} errors"
    monkeypatch.setattr(parts, "_paths", list)
    assert parts.sanitizer(asked).lines == ["left out: compute-sanitizer is not installed"]


@pytest.mark.parametrize(("capability", "archs"), [((9, 0), "90a"), ((8, 6), "86"), ((12, 0), "120a")])
def test_the_library_is_built_for_the_device_that_is_there(
    capability: tuple[int, int], archs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def build(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append([os.environ["CSRC_CUDA_ARCHS"], *command[1:]])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("CSRC_CUDA_ARCHS", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(gpu.subprocess, "run", build)
    monkeypatch.setattr(gpu, "installed_extensions", lambda: frozenset({"cpu"}))
    assert not gpu.built(False)
    assert asked == [[archs, "setup.py", "-q", "build_ext", "--inplace"]]


def test_an_entry_of_the_ledger_changes_with_the_sources() -> None:
    found = {"time_us": 1.0, "fraction": 0.5, "bar": 1.0}
    own = entry("triton", "rms_norm", {**found, "core": (), "own": ("norm.py",)}, {"rms_norm": 0.25})
    assert own["largest_error"] == 0.25
    whole = entry("triton", "rms_norm", {**found, "core": ("core/*.py",), "own": ()}, {})
    assert len({own["sources"], whole["sources"]}) == 2 and whole["largest_error"] is None


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels_name_sources_that_there_are(kernel: Kernel) -> None:
    assert kernel.sources
    assert not [name for name in kernel.sources if not (FOLDERS["triton"] / name).is_file()]


def test_the_ledger_holds_what_gpus_have_shown() -> None:
    for name, seen in json.loads(LEDGER.read_text()).items():
        assert name.split(":")[0] in FOLDERS
        assert {"date", "device", "driver", "torch", "time_us", "fraction", "sources"} <= set(seen)


@pytest.mark.parametrize("name", first.CHECKS)
def test_what_the_kernels_assume_of_the_hardware_holds_in_the_emulator(name: str) -> None:
    """So that what a GPU finds wrong is the GPU's, or the emulator's reading of it."""
    why = emulated.absent()
    if why is not None:
        pytest.skip(why)
    assert first.CHECKS[name](CudaOps(emulated.library()), torch.device("cpu")) == []


@pytest.mark.parametrize(
    ("spoil", "said"),
    (
        (lambda found, work: found[3, 1].copy_(work.cache.v[0, 0, 0]), "the value of another key"),
        (lambda found, work: found[3, 1, 8:16].neg_(), "dimensions 8 to 15 differ"),
        (lambda found, work: found[3, 1, 0].fill_(float("nan")), "NaN: what was not copied"),
    ),
)
def test_a_wrong_copy_of_attention_is_told_apart(spoil: Callable[[Tensor, Copying], object], said: str) -> None:
    work = Copying(torch.device("cpu"), (20, 33), (2, 5))
    found = work.expected.clone()
    assert work.problems(found, "as it is") == []
    spoil(found, work)
    (line,) = work.problems(found, "spoiled")
    assert line.startswith("spoiled: 1 of 56 rows; token 3, head 1, key ") and said in line


def test_a_check_that_hangs_or_dies_costs_that_check() -> None:
    assert first.one("decode", 0.0) == ["hangs: ended after 0 s"]
    assert first.one("no such check", 60.0)[0] == "ended with status 2"


def test_sums_over_devices_need_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    asked = parts.Asked("cuda", "cuda:0", "", time.time() + 100, False)
    found = parts.devices(asked)
    assert found.lines == ["left out: sums over devices need two GPUs, here is 1"] and not found.failed


@pytest.mark.parametrize("wrong", (False, True))
def test_sums_over_devices_are_compared_to_the_bit(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "SIZES", (1, 1001))
    threads = Threads(3)

    class Last(ThreadGroup):
        def sum(self, x: torch.Tensor) -> torch.Tensor:
            total = super().sum(x)
            return total.nextafter(total + 1) if wrong and self.place.rank == 2 and x.dtype == torch.float32 else total

    with ThreadPoolExecutor(3) as pool:
        groups = [Last(Place(rank, 3), threads) for rank in range(3)]
        found = list(pool.map(devices.differences, groups, [torch.device("cpu")] * 3))
    texts = [f"torch.float32, {size} elements: {size} differ on rank 2" for size in ("1", "1,001")]
    assert found == [[], [], texts if wrong else []]


def test_the_timed_model_has_the_sizes_it_says() -> None:
    from engines.ops import OpSet

    model = decoder(SMALL, OpSet(), torch.device("cpu"), 64)
    assert model.logits(torch.zeros(1, SMALL.hidden_size, dtype=torch.bfloat16)).shape == (1, SMALL.vocab_size)
