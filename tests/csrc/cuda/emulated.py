"""Builds csrc/cuda for the processor, through the emulator beside this file: ops of the same names for CPU tensors."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from csrc import cuda_build

ROOT = Path(__file__).parents[3]
EMULATOR = Path(__file__).parent / "emulator"
BUILDS = ROOT / "build" / "emulated"
HEAD_DIMS = (16, 64, 80, 128, 256)
"""16 for tiny models; 96 is compiled as 80 is."""
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
    """The emulated library of the sources in a folder, compiled unless it lies there already.

    sanitized: with AddressSanitizer, whose runtime a process must have preloaded.
    """
    files = sorted([*folder.glob("*"), *EMULATOR.glob("*"), Path(__file__)])
    digest = hashlib.sha256(torch.__version__.encode() + bytes(sanitized))
    for file in files:
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    made = BUILDS / digest.hexdigest()[:16] / "_cuda_ops.so"
    if made.is_file():
        return made
    own = made.with_name(f"objects.{os.getpid()}")
    own.mkdir(parents=True)
    include = Path(torch.__file__).parent / "include"
    extra = ["-O1", "-g1", "-fsanitize=address"] if sanitized else ["-O2"]
    base = ["g++", *FLAGS, *extra, f"-I{EMULATOR}", f"-I{folder}", f"-isystem{include}", "-x", "c++", "-c"]
    sources = sorted(folder.glob("*.cu"))
    jobs = [[*base, str(source), "-o", str(own / f"{source.stem}.o")] for source in sources]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(_run, jobs))
    objects = [str(own / f"{source.stem}.o") for source in sources]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
    _run(["g++", "-shared", *extra, *objects, *libraries, "-o", str(own / made.name)])
    (own / made.name).replace(made)
    shutil.rmtree(own)
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
