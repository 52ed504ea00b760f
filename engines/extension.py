"""The compiled libraries of ops, built by setup.py from csrc/: whether they are there, and loading them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Library:
    path: Path
    disable: str
    """The environment variable that leaves it out."""
    remedy: str


LIBRARY = Path(__file__).parent / "_cpu_ops.so"
CPU = Library(LIBRARY, "DISABLE_CPU_EXTENSION", "reinstall with a C++20 compiler on PATH")
CUDA = Library(LIBRARY.with_name("_cuda_ops.so"), "DISABLE_CUDA_ENGINE", "reinstall with nvcc on PATH")


def reason(library: Library = CPU) -> str | None:
    """Why the library is left out, as a sentence; None where it is to be used."""
    if os.environ.get(library.disable, "0") not in ("", "0"):
        return f"{library.disable} is set"
    if not library.path.is_file():
        return f"{library.path.name} was not built; {library.remedy}"
    return None


def load(library: Library = CPU) -> None:
    """Makes torch.ops.cpu_ops (cuda_ops) callable; does nothing the second time.

    Raises OSError when the library is there but does not load, as one that was built against a newer torch.
    """
    try:
        torch.ops.load_library(library.path)
    except OSError as error:
        raise OSError(
            f"{library.path.name}: {error}; expected a library built for this torch ({torch.__version__}); "
            f"reinstall the project, or set {library.disable}=1 to run without it"
        ) from error
