"""The library compiled by nvcc, once for all tests that look at it: two minutes of one core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from csrc import cuda_build


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds _cuda_ops.so, its objects, and what ptxas said of each."""
    if cuda_build.nvcc() is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("cuda_build")
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("CSRC_CUDA_ARCHS", "80,90a")
        why = cuda_build.compile(folder / "_cuda_ops.so", folder, Path(torch.__file__).parent)
    assert why is None, why
    return folder
