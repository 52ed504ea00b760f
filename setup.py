"""Builds the compiled library of CPU ops, engines/_cpu_ops.so, where it can; says what it leaves out and why.

It is a plain shared library on torch's stable ABI without Python symbols: one build serves every Python, and torch from
2.11 on. Nothing is downloaded, torch is not imported. CXX chooses the compiler; DISABLE_CPU_EXTENSION=1 leaves it out.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.h"))
TARGET_VERSION = "0x020b000000000000"
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter")


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
        why = left_out() or self.compile(target)
        if why is not None:
            target.unlink(missing_ok=True)  # one of an earlier build would be taken for this one's
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            print(f"{target.name} is left out: {why}. The CPU engine will run on plain torch, slower.", file=sys.stderr)

    def compile(self, target: Path) -> str | None:
        """Compiles and links; returns what went wrong, or None."""
        command, torch = compiler(), torch_folder()
        assert command is not None
        assert torch is not None
        include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".so.partial")
        link = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", "-shared"]
        define = f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"
        full = [*command, *FLAGS, define, *include, *SOURCES, *link, "-o", str(partial)]
        done = subprocess.run(full, cwd=ROOT, capture_output=True, text=True)  # noqa: S603
        if done.returncode != 0:
            partial.unlink(missing_ok=True)
            errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            return f"{command[0]} failed with {errors[0] if errors else done.returncode}"
        partial.replace(target)
        return None


setup(
    ext_modules=[Extension("engines._cpu_ops", SOURCES, depends=HEADERS, optional=True)],
    cmdclass={"build_ext": BuildExt},
)
