"""Every case of every op on a device, against the reference in float64 on the processor: in several processes, as
references take the time.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engines.ops import OpSet as Reference
from engines.ops import origin
from tests.cases import Case, call, cases, convert
from tests.compare import assert_as_exact
from tests.gpu import workers

CASE_S = 90.0
"""For one case, with the compilation of its kernels."""


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


def todo(backend: str, ops: Reference, only: str, one_each: bool = False) -> list[tuple[Case, torch.dtype]]:
    """The cases to check, in the same order in every process."""
    found = chosen(backend, ops, only)
    return firsts(found) if one_each else found


def firsts(found: list[tuple[Case, torch.dtype]]) -> list[tuple[Case, torch.dtype]]:
    """The first case of each op in each dtype: the generator begins with plain ones."""
    seen: dict[tuple[str, torch.dtype], tuple[Case, torch.dtype]] = {}
    for case, dtype in found:
        seen.setdefault((str(case).split("-")[0], dtype), (case, dtype))
    return list(seen.values())


def opset(backend: str) -> Reference:
    made: Reference = importlib.import_module(f"engines.{backend}.opset").OpSet()
    return made


def check_all(backend: str, device: str, only: str, deadline: float, one_each: bool = False) -> Iterator[Finding]:
    """Each case as it was checked, by the deadline (of time.time): with one_each in this process, else in one for every
    two processors, where a case that takes the device along costs that case."""
    given = (backend, device, only, one_each)
    found = todo(backend, opset(backend), only, one_each)
    if one_each:
        work = checker(*given)
        for place in range(len(found)):
            if time.time() > deadline:
                return
            yield work(place)
        return
    processes = max(1, min(8, (os.cpu_count() or 2) // 2))
    for place, result in workers.each(checker, given, range(len(found)), processes, CASE_S, deadline):
        case, dtype = found[place]
        lost = isinstance(result, workers.Lost)
        yield Finding(str(case), str(dtype).removeprefix("torch."), 0.0, result.why) if lost else result


def checker(backend: str, device: str, only: str, one_each: bool) -> Callable[[int], Finding]:
    """What checks a case by its place in `todo`."""
    open_for_good = workers.prepared(device)
    ops = opset(backend)
    found = todo(backend, ops, only, one_each)

    def work(place: int) -> Finding:
        assert open_for_good
        return _check(ops, *found[place], device)

    return work


def _check(ops: Reference, case: Case, dtype: torch.dtype, device: str) -> Finding:
    error, problem = 0.0, ""
    place = torch.device(device)
    try:
        arguments = case.arguments(dtype)
        exact = call(Reference(), case, convert(arguments, torch.float64))
        plain = call(Reference(), case, arguments)
        there = replace(case, options={key: moved(value, place) for key, value in case.options.items()})
        found = [result.cpu() for result in call(ops, there, moved(arguments, place))]
        for own, right, torchs in zip(found, exact, plain, strict=True):
            assert_as_exact(own, right, torchs)
            if own.dtype.is_floating_point and own.numel():
                error = max(error, (own.double() - right).nan_to_num(0.0, 0.0, 0.0).abs().max().item())
    except AssertionError as failure:
        problem = f"{type(failure).__name__}: {failure}"
    except Exception as failure:
        problem = workers.unless_lost(device, failure)
    return Finding(str(case), str(dtype).removeprefix("torch."), error, problem)
