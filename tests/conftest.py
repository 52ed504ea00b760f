"""Shared fixtures. Nothing here is imported by the product."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports Triton, which decides then whether its kernels run on the processor.
os.environ["TRITON_INTERPRET"] = "1"

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def weird_tmp_path(tmp_path: Path) -> Path:
    """A folder whose name has what people's folders have: spaces, an equals sign, quotes, letters beyond ASCII."""
    folder = tmp_path / "a folder=with 'odd' näme #1"
    folder.mkdir()
    return folder
