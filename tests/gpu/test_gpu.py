"""`python -m tests.gpu` as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from engines.gpu_ledger import FILE as LEDGER
from tests.engines.triton.kernels import KERNELS
from tests.gpu.__main__ import FOLDERS, ROOT
from tests.gpu.timing import SMALL, Kernel, decoder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_under_the_interpreter() -> None:
    before = LEDGER.read_bytes()
    done = run("--interpret", "--only", "write_kv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 of 9 cases hold" in done.stdout
    assert "write_kv 8192" in done.stdout
    assert LEDGER.read_bytes() == before, "a run on a processor wrote the ledger"


def test_what_the_deadline_leaves_out_is_a_failure() -> None:
    done = run("--interpret", "--only", "write_kv", "--seconds", "0")
    assert done.returncode == 1
    assert "0 of 9 cases hold" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout.startswith("no GPU: torch.cuda.is_available() is False")


@pytest.mark.slow
def test_decoding_is_timed() -> None:
    done = run("--interpret", "--only", "decode")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "decode step of 8B, batch 2" in done.stdout


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels_name_sources_that_there_are(kernel: Kernel) -> None:
    assert kernel.sources
    assert not [name for name in kernel.sources if not (FOLDERS["triton"] / name).is_file()]


def test_the_ledger_holds_what_gpus_have_shown() -> None:
    for name, entry in json.loads(LEDGER.read_text()).items():
        assert name.split(":")[0] in FOLDERS
        assert {"date", "device", "driver", "torch", "time_us", "fraction", "sources"} <= set(entry)


def test_the_timed_model_has_the_sizes_it_says() -> None:
    from engines.ops import OpSet

    model = decoder(SMALL, OpSet(), torch.device("cpu"), 64)
    assert model.logits(torch.zeros(1, SMALL.hidden_size, dtype=torch.bfloat16)).shape == (1, SMALL.vocab_size)
