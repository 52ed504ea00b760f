"""The compiled library of ops for the CPU, built by setup.py from csrc/: whether there is one, and loading it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "_cpu_ops.so"
DISABLE = "DISABLE_CPU_EXTENSION"


def reason() -> str | None:
    """Why the library is left out, as a sentence; None where it is to be used."""
    if os.environ.get(DISABLE, "0") not in ("", "0"):
        return f"{DISABLE} is set"
    if not LIBRARY.is_file():
        return f"{LIBRARY.name} was not built; reinstall with a C++20 compiler on PATH"
    return None


def load() -> None:
    """Makes torch.ops.cpu_ops callable; does nothing the second time.

    Raises OSError when the library is there but does not load, as one that was built against a newer torch.
    """
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise OSError(
            f"{LIBRARY.name}: {error}; expected a library built for this torch ({torch.__version__}); "
            f"reinstall the project, or set {DISABLE}=1 to run without it"
        ) from error
