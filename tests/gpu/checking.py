"""Every case of every op on a device, against the reference in float64 on the processor. Compiling takes the time, so
cases are dealt to several processes.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from engines.ops import OpSet as Reference
from engines.ops import origin
from tests.cases import Case, call, cases, convert
from tests.compare import assert_as_exact


@dataclass(frozen=True)
class Finding:
    case: str
    dtype: str
    error: float
    """Largest difference to float64; 0 for ops that give integers."""
    problem: str
    """Empty if the case holds."""


def chosen(backend: str, ops: Reference, only: str) -> list[tuple[Case, torch.dtype]]:
    """Cases of the ops that an op set has of its own, in the dtypes and sizes that it takes."""
    if backend == "cuda":
        from tests.engines.cuda.cases import compiled

        return [(case, dtype) for case, dtype in compiled() if only in str(case)]
    found = [case for case in cases() if origin(ops, case.op) != "reference" and only in str(case)]
    return [(case, dtype) for case in found for dtype in case.dtypes]


def moved(value: Any, device: torch.device) -> Any:
    """A deep copy on a device, with the same strides."""
    if isinstance(value, Tensor):
        there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return there.copy_(value)
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def count(backend: str, only: str, one_each: bool = False) -> int:
    """Cases that there are."""
    found = chosen(backend, importlib.import_module(f"engines.{backend}.opset").OpSet(), only)
    return len(firsts(found) if one_each else found)


def firsts(found: list[tuple[Case, torch.dtype]]) -> list[tuple[Case, torch.dtype]]:
    """The first case of each op in each dtype: the generator begins with plain ones."""
    seen: dict[tuple[str, torch.dtype], tuple[Case, torch.dtype]] = {}
    for case, dtype in found:
        seen.setdefault((str(case).split("-")[0], dtype), (case, dtype))
    return list(seen.values())


def check_all(backend: str, device: str, only: str, deadline: float, one_each: bool = False) -> list[Finding]:
    """What was checked by the deadline (of time.time): by a process for every two processors, or with one_each here."""
    if one_each:
        return check(backend, device, only, 0, 1, deadline, one_each)
    parts = max(1, min(8, (os.cpu_count() or 2) // 2))
    with ProcessPoolExecutor(parts, mp_context=get_context("spawn")) as pool:
        dealt: Sequence[Any] = [
            pool.submit(check, backend, device, only, part, parts, deadline) for part in range(parts)
        ]
        return sorted((f for job in dealt for f in job.result()), key=lambda finding: finding.case)


def check(
    backend: str, device: str, only: str, part: int, parts: int, deadline: float, one_each: bool = False
) -> list[Finding]:
    """Every parts-th case from `part` on, until the deadline."""
    with ExitStack() as stack:
        if device == "cpu":
            from tests.engines.triton.interpreter import repaired

            stack.enter_context(repaired())
        ops = importlib.import_module(f"engines.{backend}.opset").OpSet()
        found = chosen(backend, ops, only)
        findings = []
        for case, dtype in (firsts(found) if one_each else found)[part::parts]:
            if time.time() > deadline:
                break
            findings.append(_check(ops, case, dtype, torch.device(device)))
    return findings


def _check(ops: Reference, case: Case, dtype: torch.dtype, device: torch.device) -> Finding:
    error, problem = 0.0, ""
    try:
        arguments = case.arguments(dtype)
        exact = call(Reference(), case, convert(arguments, torch.float64))
        plain = call(Reference(), case, arguments)
        there = replace(case, options={key: moved(value, device) for key, value in case.options.items()})
        found = [result.cpu() for result in call(ops, there, moved(arguments, device))]
        for own, right, torchs in zip(found, exact, plain, strict=True):
            assert_as_exact(own, right, torchs)
            if own.dtype.is_floating_point and own.numel():
                error = max(error, (own.double() - right).nan_to_num(0.0, 0.0, 0.0).abs().max().item())
    except Exception as failure:
        problem = f"{type(failure).__name__}: {failure}"
    return Finding(str(case), str(dtype).removeprefix("torch."), error, problem)
