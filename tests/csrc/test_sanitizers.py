"""The compiled ops under the address and undefined-behaviour sanitizers, on every case and instruction set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csrc.test_build import ROOT, build

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1"


def runtime() -> str | None:
    """The sanitizers' library, which must be the process's first: python itself is built without."""
    if shutil.which("g++") is None:
        return None
    asked = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = asked.stdout.strip()
    return path if Path(path).is_file() else None


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with a library of its own."""
    folder = tmp_path_factory.mktemp("sanitized")
    done = build(folder, CPU_OPS_CXXFLAGS=FLAGS, CXX="g++", DISABLE_CUDA_ENGINE="1")
    assert (folder / "engines/_cpu_ops.so").stat().st_size > 10_000, done.stderr
    for name in ("engines", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so"), dirs_exist_ok=True)
    return folder


def run(checkout: Path, module: str, isa: str = "") -> subprocess.CompletedProcess[str]:
    preload = runtime()
    assert preload is not None
    # Python leaks by design; what torch hands to the allocator as aligned is freed as plain.
    options = "detect_leaks=0:alloc_dealloc_mismatch=0"
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": options, "CPU_OPS_ISA": isa, "PYTHONPATH": "."}
    command = [sys.executable, *module.split()]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


pytestmark = [pytest.mark.slow, pytest.mark.skipif(runtime() is None, reason="no g++ with sanitizers")]


@pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512", "amx"))
def test_nothing_is_read_or_written_out_of_place(checkout: Path, isa: str) -> None:
    done = run(checkout, "-m tests.csrc.sanitized", isa)
    if "at most" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[0]) > 100


def test_the_sanitizers_watch(checkout: Path) -> None:
    """A read past a block table that is shorter than it says is found, so the test above can fail."""
    script = """
import torch
from engines import extension
extension.load()
q = torch.zeros(64, 1, 32)
offsets = torch.tensor([0, 64], dtype=torch.int32)
torch.ops.cpu_ops.encoder_attention(q, q.as_strided((64, 1, 32), (99999, 1, 1)), q, offsets, 1.0)
"""
    (checkout / "overrun.py").write_text(script)
    done = run(checkout, "overrun.py")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
