"""Every op set that there is, on every case: overrides against the reference in float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import engines
from engines.ops import OP_NAMES, OpSet
from tests.cases import Case, call, cases, convert
from tests.compare import assert_as_exact

CASES = cases()
BACKENDS = sorted(path.parent.name for path in Path(engines.__path__[0]).glob("*/opset.py"))
FORMS = [*(name for name in BACKENDS if name not in ("cuda", "triton")), "cpu without its library"]
"""Those that run on this processor as they are; tests/engines/{cuda,triton} run the others' kernels on it."""


@pytest.fixture(params=FORMS)
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> OpSet:
    backend, without, _ = request.param.partition(" without")
    if without:
        monkeypatch.setenv("DISABLE_CPU_EXTENSION", "1")
    made: OpSet = importlib.import_module(f"engines.{backend}.opset").OpSet()
    return made


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_the_reference(ops: OpSet, case: Case) -> None:
    reference = OpSet()
    for dtype in case.dtypes:
        arguments = case.arguments(dtype)
        exact = call(reference, case, convert(arguments, torch.float64))
        plain = call(reference, case, arguments)
        found = call(ops, case, arguments)
        assert len(found) == len(exact)
        for results in zip(found, exact, plain, strict=True):
            assert_as_exact(*results)


def test_there_are_cases_for_every_op() -> None:
    made = {name for name in OP_NAMES if name.startswith(("prepare_", "allocate_"))}
    assert {case.op for case in CASES} | made == set(OP_NAMES)


def test_backends_are_found() -> None:
    assert "cpu" in BACKENDS


def wrong(op: str) -> Callable[..., object]:
    """The reference with an error of a hundredth in one value."""

    def apply(*arguments: object, **options: object) -> object:
        result = getattr(OpSet(), op)(*arguments, **options)
        result.view(-1)[-1] *= 1.01
        return result

    return apply


@pytest.mark.parametrize("op", ["rms_norm", "paged_attention", "linear"])
def test_a_wrong_op_is_noticed(op: str) -> None:
    broken = OpSet()
    setattr(broken, op, wrong(op))
    case = next(c for c in CASES if c.op == op and "0x" not in c.name and "1x1" not in c.name)
    arguments = case.arguments(torch.float32)
    exact = call(OpSet(), case, convert(arguments, torch.float64))
    with pytest.raises(AssertionError, match="twice torch's own error"):
        assert_as_exact(call(broken, case, arguments)[0], exact[0], call(OpSet(), case, arguments)[0])
