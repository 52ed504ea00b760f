"""The emulator notices what it is there for: missing barriers, reads past the end of memory, uneven barriers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from csrc import cuda_build
from tests.csrc.cuda import emulated
from tests.engines.cuda.cases import OPS

ROOT = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(emulated.absent() is not None, reason=str(emulated.absent())),
]
BARRIER = re.compile(
    r"__sync(?:threads|warp)\(\);|copy_wait<[^;]*>\(\);|products_wait<\d>\([^;]*\);|sync_some\([^;]*\);|barrier_wait\([^;]*\);|"
    r"cluster_sync\(\);"
)
UNSEEN = {
    ("attention_decode.cuh", 1): "emulated lanes meet in the exchange of load_matrices anyway",
    ("attention_decode.cuh", 4): "no order here keeps a warp waiting until all other blocks have finished",
    ("attention_decode.cuh", 5): "what lies in is_last before means yes: rows are stored twice, the right ones last",
    ("latent_attention.cuh", 0): "emulated lanes meet in the shuffles anyway",
    ("latent_attention.cuh", 5): "no order here keeps a warp waiting until all other blocks have finished",
    ("latent_attention.cuh", 6): "what lies in is_last before means yes: rows are stored twice, the right ones last",
    ("product_sm90.cuh", 6): "no order here keeps a warp waiting until all other blocks have finished",
    ("product_sm90.cuh", 13): "emulated lanes arrive one by one",
    ("product_sm90.cuh", 14): "no order here keeps a warp waiting until the other block of its cluster has ended",
}
"""Barriers that the GPU needs and the emulator does not miss."""
OPS_OF = {
    "all_reduce": ["all_reduce"],
    "attention_coded": ["quantized_attention"],
    "attention_prefill.": ["paged_attention", "quantized_attention"],
    "attention": ["paged_attention"],
    "elementwise": ["rms_norm", "add_rms_norm"],
    "latent": ["latent_attention"],
    "linear_fp8": ["linear"],
    "moe": ["route", "fused_experts"],
    "product": ["linear"],
    "quantize": ["act_and_mul_for"],
    "splits": ["linear"],
    "sampling": ["sample"],
}


def barriers() -> list[tuple[str, int]]:
    """(file, number in it) of every barrier of every kernel."""
    files = sorted(cuda_build.FOLDER.glob("*.cuh"))
    files = [path for path in files if path.name != "primitives.cuh"]
    found = [(path.name, i) for path in files for i in range(len(BARRIER.findall(path.read_text("utf-8"))))]
    return [barrier for barrier in found if barrier not in UNSEEN]


def run(library: Path, ops: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.csrc.cuda.child", str(library), *ops]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def changed(tmp_path: Path, file: str, text: str) -> Path:
    """A library of the sources with another text in one file."""
    folder = tmp_path / "cuda"
    shutil.copytree(cuda_build.FOLDER, folder)
    (folder / file).write_text(text, encoding="utf-8")
    return emulated.library(folder)


def was_noticed(done: subprocess.CompletedProcess[str]) -> bool:
    """By results that are wrong or differ, by threads that wait for nobody, or by a write where no memory is."""
    return done.returncode in (-signal.SIGSEGV, -signal.SIGABRT) or "noticed: " in done.stderr


def ops_of(file: str) -> list[str]:
    return next(ops for prefix, ops in OPS_OF.items() if file.startswith(prefix))


@pytest.mark.parametrize(("file", "number"), barriers())
def test_a_missing_barrier_is_noticed(tmp_path: Path, file: str, number: int) -> None:
    text = (cuda_build.FOLDER / file).read_text("utf-8")
    found = list(BARRIER.finditer(text))[number]
    library = changed(tmp_path, file, f"{text[: found.start()]}{{}}{text[found.end() :]}")
    done = run(library, ops_of(file))
    shutil.rmtree(library.parent)
    what = f"{file} without {found[0]!r} at {found.start()}"
    assert was_noticed(done), f"{what}: {done.stderr or 'every result is right'}"


@pytest.mark.parametrize(
    ("text", "instead"),
    (
        ("call % 2", "0"),
        ("2 * call + 1", "2 * call"),
        ("wait_flag(&state_of(p, p.rank)->flags[blockIdx.x][threadIdx.x], step);", ""),
        ("own->calls = call;", ""),
        ("own->arrived = 0;", ""),
    ),
)
def test_an_error_in_how_devices_wait_for_each_other_is_noticed(tmp_path: Path, text: str, instead: str) -> None:
    file = "all_reduce.cuh"
    kernel = (cuda_build.FOLDER / file).read_text("utf-8")
    assert kernel.count(text) == 1
    library = changed(tmp_path, file, kernel.replace(text, instead))
    done = run(library, ["all_reduce"])
    shutil.rmtree(library.parent)
    assert was_noticed(done), f"{file} with {instead!r} in place of {text!r}: {done.stderr or 'every result is right'}"


def test_nothing_is_noticed_in_the_kernels_as_they_are() -> None:
    attention = ["paged_attention", "quantized_attention", "latent_attention"]
    others = ["rms_norm", "add_rms_norm", "linear", "rope_write_kv", "act_and_mul_for", "all_reduce"]
    done = run(emulated.library(), [*attention, *others])
    assert done.returncode == 0, done.stderr


def sanitizer() -> dict[str, str]:
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0"}


def test_kernels_stay_within_their_memory() -> None:
    """AddressSanitizer over all compiled ops: global memory, and shared memory to the byte."""
    every = [*OPS, "linear", "all_reduce"]
    done = run(emulated.library(sanitized=True), every, **sanitizer())
    assert done.returncode == 0, done.stderr[:4000]


def test_shared_memory_that_is_too_small_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "cuda"
    shutil.copytree(cuda_build.FOLDER, folder)
    launch = folder / "attention_prefill.cu"
    text = launch.read_text("utf-8")
    assert "Shape::kSharedBytes" in text
    launch.write_text(text.replace("Shape::kSharedBytes", "Shape::kSharedBytes - 256"), encoding="utf-8")
    library = emulated.library(folder, sanitized=True)
    done = run(library, ["paged_attention"], **sanitizer())
    shutil.rmtree(library.parent)
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
