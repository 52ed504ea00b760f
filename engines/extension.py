"""The compiled libraries of ops, built by setup.py from csrc/: whether they are there and current, and loading them.

Only `load` imports torch: plans ask the rest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from engines import sources


@dataclass(frozen=True)
class Library:
    path: Path
    disable: str
    """The environment variable that leaves it out."""
    remedy: str
    sources: Path | None = None
    """The folder that it is built from, in a checkout; an installed package has none."""


LIBRARY = Path(__file__).parent / "_cpu_ops.so"
CSRC = LIBRARY.parents[1] / "csrc"
CPU = Library(LIBRARY, "DISABLE_CPU_EXTENSION", "reinstall with a C++20 compiler on PATH", CSRC / "cpu")
CUDA = Library(LIBRARY.with_name("_cuda_ops.so"), "DISABLE_CUDA_ENGINE", "reinstall with nvcc on PATH")


def reason(library: Library = CPU) -> str | None:
    """Why the library is left out, as a sentence; None where it is to be used."""
    if os.environ.get(library.disable, "0") not in ("", "0"):
        return f"{library.disable} is set"
    if not library.path.is_file():
        return f"{library.path.name} was not built; {library.remedy}"
    return None


def stale(library: Library = CPU) -> str | None:
    """Why `load` refuses the library: it was built from other sources than those beside it. None if it was not."""
    folder = library.sources
    if folder is None or not folder.is_dir():
        return None
    expected = sources.digest(folder)
    _, _, rest = library.path.read_bytes().partition(sources.MARK.encode())
    found = rest[: len(expected)].decode("ascii", "replace") if rest else "none"
    if found == expected:
        return None
    return (
        f"{library.path.name}: built from sources with digest {found}; expected {expected}, that of "
        f"{folder.parent.name}/{folder.name}; run 'python setup.py build_ext --inplace', or set {library.disable}=1 to "
        "run without it"
    )


def load(library: Library = CPU) -> None:
    """Makes torch.ops.cpu_ops (cuda_ops) callable; does nothing the second time.

    Raises OSError when the library is there but does not load, as one that was built against a newer torch, or when it
    is stale.
    """
    import torch

    if str(library.path) in torch.ops.loaded_libraries:
        return
    if why := stale(library):
        raise OSError(why)
    try:
        torch.ops.load_library(library.path)
    except OSError as error:
        raise OSError(
            f"{library.path.name}: {error}; expected a library built for this torch ({torch.__version__}); "
            f"reinstall the project, or set {library.disable}=1 to run without it"
        ) from error
