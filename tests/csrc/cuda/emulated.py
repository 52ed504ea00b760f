"""Builds csrc/cuda for the processor, through the emulator beside this file: ops of the same names for CPU tensors."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from csrc import cuda_build

ROOT = Path(__file__).parents[3]
EMULATOR = Path(__file__).parent / "emulator"
BUILDS = ROOT / "build" / "emulated"
HEAD_DIMS = (16, 64, 80, 96, 128, 256)
"""16 for tiny models."""
FLAGS = (
    "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unknown-pragmas",
    "-ffp-contract=off", f"-DCUDA_OPS_HEAD_DIMS(X)={' '.join(f'X({size})' for size in HEAD_DIMS)}", "-DCUDA_OPS_SM90",
    f"-DTORCH_TARGET_VERSION={cuda_build.TARGET_VERSION}",
)  # fmt: skip


def absent() -> str | None:
    """Why there can be no emulated library here; None where there can."""
    if shutil.which("g++") is None:
        return "no g++ on PATH"
    return None if os.uname().machine == "x86_64" else "the emulator switches fibers on x86-64 only"


def library(folder: Path = cuda_build.FOLDER, sanitized: bool = False) -> Path:
    """The emulated library of the sources in a folder. Compiled is what was not compiled before.

    sanitized: with AddressSanitizer, whose runtime a process must have preloaded.
    """
    BUILDS.mkdir(parents=True, exist_ok=True)
    extra = ["-O1", "-g1", "-fsanitize=address"] if sanitized else ["-O1"]
    jobs = {
        _digest([*_closure(source, folder)], extra): source
        for source in sorted([*folder.glob("*.cu"), *EMULATOR.glob("*.cu")])
    }
    made = BUILDS / _digest([], [*extra, *jobs]) / "_cuda_ops.so"
    if made.is_file():
        return made
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _object(*job, folder, extra), jobs.items()))
    made.parent.mkdir(exist_ok=True)
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
    partial = made.with_suffix(f".{os.getpid()}")
    _run(["g++", "-shared", *extra, *map(str, objects), *libraries, "-o", str(partial)])
    return partial.replace(made)


def _object(digest: str, source: Path, folder: Path, extra: list[str]) -> Path:
    made = BUILDS / f"{digest}.o"
    if not made.is_file():
        include = Path(torch.__file__).parent / "include"
        partial = made.with_suffix(f".{os.getpid()}")
        places = [f"-I{EMULATOR}", f"-I{folder}", f"-isystem{include}"]
        _run(["g++", *FLAGS, *extra, *places, "-x", "c++", "-c", str(source), "-o", str(partial)])
        partial.replace(made)
    return made


def _closure(source: Path, folder: Path) -> list[Path]:
    """A source and all of ours that it includes, as the compiler finds them: the emulator's first."""
    found = [source]
    for path in found:
        for name in re.findall(r'#include [<"]([\w.]+)[>"]', path.read_text("utf-8")):
            here = next((place / name for place in (EMULATOR, folder) if (place / name).is_file()), None)
            if here is not None and here not in found:
                found.append(here)
    return sorted(found)


def _digest(files: list[Path], words: list[str]) -> str:
    digest = hashlib.sha256(" ".join([torch.__version__, *FLAGS, *words]).encode())
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
