"""What launches compile, as the launches of real calls specialize it, for a GPU that is not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MODULE = "tests.engines.triton.launched"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_what_launches_ask_for_is_compiled() -> None:
    done = python("-m", MODULE, "90", "--parts", "cases", "--only", "write_kv-", "--front", "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    found, made = (int(line.split()[0]) for line in done.stdout.splitlines())
    assert found == made >= 3


FAULTS = """
import time, torch
from engines.triton.activation import elementwise_kernel
from tests.engines.triton.launched import compile_all, noted
x = torch.zeros(2, 8)
with noted(90) as found:
    elementwise_kernel[(2, 1)](x, x, 8, 1.0, N=8, NAME="relu", B=8)
    elementwise_kernel[(2, 1)](x, x, 8, 1.0, N=8, NAME="unknown", B=8)
    try:
        elementwise_kernel[(2, 65536)](x, x, 8, 1.0, N=8, NAME="relu", B=8)
    except AssertionError as error:
        print(error)
if __name__ == "__main__":
    for variant in found.values():
        try:
            variant.front()
        except Exception as error:
            print(variant.constants[5,], type(error).__name__)
"""


def test_a_launch_that_no_gpu_takes_is_noticed() -> None:
    done = python("-c", FAULTS)
    assert done.stdout.splitlines() == [
        "elementwise_kernel: a grid of (2, 65536); expected at most (2147483647, 65535, 65535)",
        "unknown CompilationError",
    ], done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("part", ("cases", "kernels", "steps"))
def test_everything_that_is_launched_is_compiled(part: str) -> None:
    done = python("-m", MODULE, "90", "--parts", part, "--front")
    assert done.returncode == 0, done.stdout + done.stderr
