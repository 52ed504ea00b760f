"""The CUDA op set on the emulated library: every kernel, on this processor."""

from __future__ import annotations

import pytest

from engines.cuda.opset import OpSet
from tests.csrc.cuda import emulated


@pytest.fixture(scope="session")
def ops() -> OpSet:
    why = emulated.absent()
    if why is not None:
        pytest.skip(why)
    return OpSet(emulated.library())
