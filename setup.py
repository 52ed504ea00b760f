"""Builds the compiled libraries of ops, engines/_{cpu,cuda}_ops.so, where it can; says what it leaves out and why.

They are plain shared libraries on torch's stable ABI without Python symbols: one build serves every Python, and torch
from 2.11 on. Nothing is downloaded, torch is not imported. CXX chooses the compiler, CPU_OPS_CXXFLAGS adds flags to
compile and link with, DISABLE_CPU_EXTENSION=1 leaves the CPU's out; how the CUDA one is built, and what chooses it, is
in csrc/cuda_build.py.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # as pip runs this file, its own folder is not where Python looks

from csrc import cuda_build  # noqa: E402
from engines import sources  # noqa: E402

CUDA = "engines._cuda_ops"
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.h"))
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in cuda_build.FOLDER.glob("*.cu*"))
KERNEL_SUFFIX = "_kernel.cpp"
"""Sources compiled once for each instruction set; the others choose among them at run time."""
X86_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "baseline": (),
}
AMX_SUFFIX = "_amx.cpp"
"""Sources for the matrix unit only."""
AMX_FLAGS = (*X86_FLAGS["avx512"], "-mbmi2", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8")
TARGET_VERSION = "0x020b000000000000"
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter")


def torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def compiler() -> list[str] | None:
    """The command of a C++ compiler: CXX if it is set, else the first one on PATH."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        return command if shutil.which(command[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def left_out() -> str | None:
    """Why the library cannot be built here; None where it can."""
    if os.environ.get("DISABLE_CPU_EXTENSION", "0") not in ("", "0"):
        return "DISABLE_CPU_EXTENSION is set"
    if not SOURCES:
        return "csrc/cpu has no sources"
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only so far, this is {sys.platform}"
    if torch_folder() is None:
        return "torch is not installed where setup.py runs: install torch first, then this with --no-build-isolation"
    if compiler() is None:
        return "no C++ compiler: CXX is not one" if os.environ.get("CXX") else "no C++ compiler on PATH"
    return None


class BuildExt(build_ext):
    """Runs the compiler itself, since setuptools' extensions are Python modules and this library is none."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        if ext.name == CUDA:
            why, remedy = cuda_build.left_out(torch_folder()) or self.compile_cuda(target), "The CUDA engine cannot run"
        else:
            why, remedy = left_out() or self.compile(target), "The CPU engine will run on plain torch, slower"
        if why is not None:
            target.unlink(missing_ok=True)  # one of an earlier build would be taken for this one's
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            print(f"{target.name} is left out: {why}. {remedy}.", file=sys.stderr)

    def compile_cuda(self, target: Path) -> str | None:
        torch = torch_folder()
        assert torch is not None
        return cuda_build.compile(target, Path(self.build_temp).absolute() / "cuda", torch)

    def compile(self, target: Path) -> str | None:
        """Compiles and links; returns what went wrong, or None."""
        command, torch = compiler(), torch_folder()
        assert command is not None
        assert torch is not None
        flags = [*FLAGS, f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", f"-I{torch / 'include'}"]
        flags.append(f"-DCPU_OPS_SOURCES={sources.digest(ROOT / 'csrc' / 'cpu')}")
        x86 = platform.machine() in ("x86_64", "AMD64")
        if x86:
            flags.append("-DCPU_OPS_X86")
        added = shlex.split(os.environ.get("CPU_OPS_CXXFLAGS", ""))
        temporary = Path(self.build_temp).absolute()
        temporary.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs: dict[Path, list[str]] = {}
        for source in SOURCES:
            stem = Path(source).stem
            for isa, extra in variants(source, x86):
                jobs[temporary / f"{stem}.{isa}.o"] = [*command, *flags, *extra, *added, f"-DISA={isa}", "-c", source]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            failures = pool.map(run, [[*job, "-o", str(made)] for made, job in jobs.items()])
            why = next((failure for failure in failures if failure), None)
        if why:
            return why
        partial = target.with_suffix(".so.partial")
        link = ["-shared", *added, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(partial)]
        why = run([*command, *map(str, jobs), *link])
        if why is None:
            partial.replace(target)
        return why


def variants(source: str, x86: bool) -> list[tuple[str, tuple[str, ...]]]:
    """The instruction sets that a source is compiled for, each with its compiler flags."""
    if source.endswith(AMX_SUFFIX):
        return [("amx", AMX_FLAGS)] if x86 else []
    if source.endswith(KERNEL_SUFFIX) and x86:
        return list(X86_FLAGS.items())
    return [("baseline", ())]


def run(command: list[str]) -> str | None:
    """The first error of a compiler's command, None where there was none."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # noqa: S603
    if done.returncode == 0:
        return None
    lines = done.stderr.splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else f"{command[0]} failed")


setup(
    ext_modules=[
        Extension("engines._cpu_ops", SOURCES, depends=HEADERS, optional=True),
        Extension(CUDA, CUDA_SOURCES, depends=[*HEADERS, *CUDA_SOURCES], optional=True),
    ],
    cmdclass={"build_ext": BuildExt},
)
