"""What setup.py builds, and what it says when it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engines import extension

ROOT = Path(__file__).parents[2]
ABSENT = extension.reason() is not None or shutil.which("readelf") is None
needs_library = pytest.mark.skipif(ABSENT, reason="no library, or no readelf")


def build(tmp_path: Path, machine: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py on a copy of what it reads, so that the library in use stays. machine: what it takes this for."""
    for name in ("setup.py", "csrc", "pyproject.toml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "engines").mkdir()
    for name in ("__init__.py", "sources.py"):
        shutil.copy(ROOT / "engines" / name, tmp_path / "engines" / name)
    (tmp_path / "engines/_cpu_ops.so").write_text("of an earlier build")
    (tmp_path / "README.md").touch()
    start = ["setup.py"]
    if machine:
        start = ["-c", f"import platform, runpy; platform.machine = {machine!r}.lower; runpy.run_path('setup.py')"]
    command = [sys.executable, *start, "-q", "build_ext", "--inplace"]
    inherited = {name: value for name, value in os.environ.items() if name not in ("CXX", "DISABLE_CPU_EXTENSION")}
    return subprocess.run(command, cwd=tmp_path, env={**inherited, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("environment", "why"),
    (
        ({"DISABLE_CPU_EXTENSION": "1"}, "DISABLE_CPU_EXTENSION is set"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler: CXX is not one"),
        ({"PATH": "/nonexistent"}, "no C++ compiler on PATH"),
        ({"CXX": "false"}, "false failed"),
    ),
    ids=("disabled", "wrong CXX", "no compiler", "compiler fails"),
)
def test_a_build_without_the_library_says_why_and_succeeds(
    tmp_path: Path, environment: dict[str, str], why: str
) -> None:
    done = build(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert f"_cpu_ops.so is left out: {why}" in done.stderr
    assert not (tmp_path / "engines/_cpu_ops.so").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_build_makes_the_library(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "engines/_cpu_ops.so").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_build_for_another_processor_is_right_as_well(tmp_path: Path) -> None:
    """Without anything of x86: as on aarch64, but for the compiler."""
    done = build(tmp_path, "aarch64", CPU_OPS_CXXFLAGS="-O1", DISABLE_CUDA_ENGINE="1")
    assert done.returncode == 0, done.stderr
    library = (tmp_path / "engines/_cpu_ops.so").read_bytes()
    assert len(library) > 10_000, done.stderr
    assert b"cpu_ops6avx512" not in library
    assert b"cpu_ops8baseline" in library
    for name in ("engines", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"), dirs_exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/engines/ops/test_ops.py"]
    tested = subprocess.run(
        [*command, "-k", "cpu and not without and (attention or norm or act or rope or write_kv or argmax)"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stdout[-4000:] + tested.stderr[-2000:]
    assert " passed" in tested.stdout


@needs_library
def test_the_library_needs_neither_python_nor_an_openmp_runtime() -> None:
    command = ["readelf", "--wide", "--dynamic", "--dyn-syms", str(extension.LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in listing
    foreign = ("libpython", " Py", " _Py", "libgomp", "libomp", "libiomp", "GOMP_", "__kmpc_")
    assert not [line for line in listing.splitlines() if any(name in line for name in foreign)]


@needs_library
def test_the_library_takes_nothing_but_stable_functions_from_torch() -> None:
    """C++ symbols of torch change from version to version; the stable ones are C functions."""
    command = ["readelf", "--wide", "--dyn-syms", str(extension.LIBRARY)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    undefined = [line.split()[-1] for line in lines if " UND " in line]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)
    assert not [
        name for name in undefined if name.startswith("_Z") and ("3c10" in name or "2at" in name or "5torch" in name)
    ]
