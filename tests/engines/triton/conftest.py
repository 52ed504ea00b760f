"""The Triton op set under its interpreter, on this processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.ops import OpSet
from engines.triton.opset import OpSet as TritonOpSet
from tests.engines.triton.interpreter import repaired


@pytest.fixture(scope="session")
def ops() -> Iterator[OpSet]:
    with repaired():
        yield TritonOpSet()
