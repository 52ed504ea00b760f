"""Code of the Triton kernels for GPUs that are not here: within registers and shared memory, on the tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.triton.launched import SHARED

ROOT = Path(__file__).resolve().parents[3]
REGISTERS = 65536
"""Of a multiprocessor."""
GROUPS = ("attention", "cache", "adapters", "elementwise", "sampling", "packed", "even", "mixtures")
EVERYTHING = [(sm, group, "") for sm in (80, 90, 120) for group in GROUPS]
MATRIX = ("prefill", "encoder", "decode", "shrink", "expand", "product", "experts")
"""First words of the names of kernels that multiply matrices."""
FEW_ROWS = ("decode", "shrink", "expand")
"""Of those whose tiles may have fewer rows than a warpgroup's product, 64."""


def build(sm: int, group: str, ending: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.engines.triton.aot", str(sm), group, ending]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    made: list[dict[str, Any]] = json.loads(done.stdout)
    assert made
    return made


def check(sm: int, kernel: dict[str, Any]) -> None:
    name = kernel["name"]
    assert kernel["shared"] <= SHARED[sm], name
    assert kernel["registers"] * kernel["threads"] <= REGISTERS, name
    assert kernel["spills"] == kernel["stack"] == 0, f"{name} spills: {kernel}"
    first = name.split()[0]
    if sm == 90 and first in MATRIX and first not in FEW_ROWS:
        assert kernel["hgmma"] and not kernel["hmma"], f"{name}: no warpgroup products"
    elif first in MATRIX:
        assert kernel["hmma"] or kernel["hgmma"], f"{name}: not on the tensor cores"


def test_attention_for_sm_90() -> None:
    for kernel in build(90, "attention", " 128"):
        check(90, kernel)


def test_products_of_packed_weights_for_sm_90() -> None:
    for kernel in build(90, "packed", "w4 g128 1"):
        check(90, kernel)


@pytest.mark.slow
@pytest.mark.parametrize(("sm", "group", "ending"), EVERYTHING)
def test_every_kernel(sm: int, group: str, ending: str) -> None:
    for kernel in build(sm, group, ending):
        check(sm, kernel)


BEFORE_80 = [
    (sm, *named) for sm in (70, 75) for named in (("attention", " 64"), ("packed", "128 1"), ("elementwise", ""))
]
BEFORE_80.append((70, "cache", "576"))


@pytest.mark.slow
@pytest.mark.parametrize(("sm", "group", "ending"), BEFORE_80)
def test_before_sm_80(sm: int, group: str, ending: str) -> None:
    """In float16, without tensor cores (Triton has none for them): right, and slow."""
    for kernel in build(sm, group, ending):
        assert kernel["shared"] <= SHARED[sm], kernel["name"]
        assert kernel["registers"] * kernel["threads"] <= REGISTERS, kernel["name"]
