"""Builds the compiled library of CUDA ops, engines/_cuda_ops.so, from csrc/cuda with nvcc; used by setup.py.

Like the CPU's it is a plain shared library on torch's stable ABI. The CUDA runtime is linked statically, so neither a
GPU nor a CUDA build of torch is needed to compile it or to read its table. No PTX is embedded: nothing is compiled at
run time. CSRC_CUDA_ARCHS chooses architectures ("80,90a"); DISABLE_CUDA_ENGINE=1 leaves the library out.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "cuda"
FLAGS = (
    "-std=c++20", "-O3", "-DNDEBUG", "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static", "--diag-suppress=20012",
)  # fmt: skip
TARGET_VERSION = "0x020b000000000000"
MINIMUM = 80
"""First architecture with what the kernels are made of: asynchronous copies, bfloat16 on the tensor cores."""
ONLY = "_sm90"
"""Ending of sources for one architecture alone: here those of sm_90a."""


def architectures(version: tuple[int, int], machine: str) -> tuple[str, ...]:
    """What an nvcc of this version compiles for, of the chips that people have.

    version: of the CUDA toolkit. machine: of the processor, as platform.machine() names it.
    """
    if machine in ("aarch64", "arm64"):
        found = ["72"] if version < (13, 0) else []
        found += ["87"] if version >= (11, 8) else []
        return (*found, "90a") if version >= (12, 0) else tuple(found)
    found = ["70", "75"] if version < (13, 0) else []
    found.append("80")
    found += ["86", "89"] if version >= (11, 8) else []
    found += ["90a"] if version >= (12, 0) else []
    found += ["100a", "120a"] if version >= (12, 8) else []
    return tuple(found)


def chosen(version: tuple[int, int], machine: str, wanted: str) -> tuple[str, ...]:
    """The architectures to compile for: `wanted`, comma-separated, or all that nvcc and the kernels can.

    Raises ValueError for one that cannot be.
    """
    able = tuple(arch for arch in architectures(version, machine) if number(arch) >= MINIMUM)
    if not wanted:
        return able
    asked = tuple(arch.strip() for arch in wanted.split(","))
    odd = [arch for arch in asked if arch not in able]
    if odd:
        raise ValueError(
            f"CSRC_CUDA_ARCHS: {', '.join(odd)}; expected some of {', '.join(able)} with nvcc "
            f"{version[0]}.{version[1]} on {machine}, comma-separated"
        )
    return asked


def number(arch: str) -> int:
    return int(arch.rstrip("af"))


def nvcc() -> str | None:
    """The compiler's path: on PATH, or in CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)


def nvcc_version(text: str) -> tuple[int, int] | None:
    """Of what `nvcc --version` prints."""
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def left_out(torch: Path | None) -> str | None:
    """Why the library is not built here; None where it is."""
    if os.environ.get("DISABLE_CUDA_ENGINE", "0") not in ("", "0"):
        return "DISABLE_CUDA_ENGINE is set"
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only, this is {sys.platform}"
    if torch is None:
        return "torch is not installed where setup.py runs: install torch first, then this with --no-build-isolation"
    if nvcc() is None:
        return "no nvcc on PATH or in CUDA_HOME"
    if not (torch / "lib" / "libtorch_cuda.so").exists() and not os.environ.get("CSRC_CUDA_ARCHS"):
        return "torch is a CPU build; set CSRC_CUDA_ARCHS to compile it all the same"
    return None


def sources(archs: Sequence[str]) -> list[Path]:
    """Those that the architectures have a use for."""
    return sorted(path for path in FOLDER.glob("*.cu") if not path.stem.endswith(ONLY) or "90a" in archs)


def commands(compiler: Sequence[str], torch: Path, archs: Sequence[str], objects: Path) -> dict[Path, list[str]]:
    """Object file -> the command that makes it."""
    defined = [f'-DCUDA_OPS_SM="{" ".join(str(number(arch)) for arch in archs)}"']
    defined += ["-DCUDA_OPS_SM90"] if "90a" in archs else []
    made = {}
    for source in sources(archs):
        own = ["90a"] if source.stem.endswith(ONLY) else archs
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in own]
        include = [f"-I{FOLDER}", f"-I{torch / 'include'}", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
        made[objects / f"{source.stem}.o"] = [
            *compiler, *FLAGS, *defined, *include, *code, "-c", str(source), "-o", str(objects / f"{source.stem}.o")
        ]  # fmt: skip
    return made


def compile(target: Path, objects: Path, torch: Path) -> str | None:
    """Compiles and links; returns what went wrong, or None. What ptxas says lies beside the objects, in *.ptxas."""
    compiler = nvcc()
    assert compiler is not None
    version = nvcc_version(subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout)  # noqa: S603
    if version is None:
        return f"{compiler} --version does not say its release"
    try:
        archs = chosen(version, platform.machine(), os.environ.get("CSRC_CUDA_ARCHS", ""))
    except ValueError as error:
        return str(error)
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    launcher = [shutil.which("ccache") or ""] if shutil.which("ccache") else []
    jobs = commands([*launcher, compiler], torch, archs, objects)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        failures = list(pool.map(_compile_one, jobs.items()))
    why = next((failure for failure in failures if failure), None)
    if why:
        return why
    partial = target.with_suffix(".so.partial")
    # libtorch.so stands for torch's CUDA library where there is one, and loads where there is none.
    link = ["-shared", "-cudart=static", f"-L{torch / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu"]
    done = subprocess.run([compiler, *link, *map(str, jobs), "-o", str(partial)], capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        return _first_error(done.stderr) or f"{compiler} failed to link"
    partial.replace(target)
    return None


def _compile_one(job: tuple[Path, list[str]]) -> str | None:
    made, command = job
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        return _first_error(done.stderr) or f"{command[0]} failed on {made.stem}.cu"
    made.with_suffix(".ptxas").write_text(done.stdout + done.stderr, encoding="utf-8")
    return None


def _first_error(text: str) -> str | None:
    lines = text.splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else None)
