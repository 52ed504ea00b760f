"""What was seen on GPUs: engines/gpu_ledger.json, written by `python -m tests.gpu` and nothing else. No torch."""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
GPU_ENGINES = ("cuda", "triton")


def unseen(engine: str, file: Path = FILE) -> str | None:
    """The sentence for an engine whose kernels no GPU has run yet; None for the others."""
    if engine not in GPU_ENGINES or any(name.startswith(f"{engine}:") for name in json.loads(file.read_text())):
        return None
    return "no GPU has run its kernels yet: they were compiled, and checked on a processor; try a few rows first"
