"""One part of `python -m tests.gpu`, in a process of its own: an error of the device ends with it.

    python -m tests.gpu.parts check --backend triton --seconds 100 --result FILE

The result is JSON: lines to print, entries for the ledger, whether it failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SANITIZER = "compute-sanitizer"
"""Among the programs on PATH or in a CUDA toolkit."""


@dataclass
class Result:
    lines: list[str] = field(default_factory=list)
    failed: bool = False
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name without the backend: time_us, fraction, bar, and the files that decide them: the backend's `own`, and
    `core`, globs under engines/."""
    errors: dict[str, float] = field(default_factory=dict)
    """Largest difference to float64 by op."""
    ceilings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    backend: str
    device: str
    only: str
    deadline: float
    one_each: bool


def check(asked: Asked) -> Result:
    """Every case of every op against float64."""
    from tests.gpu import checking

    findings = checking.check_all(asked.backend, asked.device, asked.only, asked.deadline, asked.one_each)
    wrong = [finding for finding in findings if finding.problem]
    expected = checking.count(asked.backend, asked.only, asked.one_each)
    result = Result([f"{len(findings) - len(wrong)} of {expected} cases hold"])
    result.lines += [f"  {finding.case} {finding.dtype}: {finding.problem}" for finding in wrong]
    result.failed = bool(wrong) or len(findings) < expected
    for finding in findings:
        op = finding.case.split("-")[0]
        result.errors[op] = max(result.errors.get(op, 0.0), finding.error)
    return result


def kernels(asked: Asked) -> Result:
    """Each kernel against the device's limits."""
    from tests.gpu import timing

    ops, place, limits, result = _ready(asked)
    works = importlib.import_module(f"tests.engines.{asked.backend}.kernels")
    libraries = works.by_libraries() if asked.backend == "triton" else []
    chosen = [k for k in (*works.KERNELS, *libraries) if asked.only in k.name]
    for number, kernel in enumerate(chosen):
        if time.time() > asked.deadline:
            result.failed = True
            result.lines.append(f"  {len(chosen) - number} kernels left out: no time")
            break
        try:
            _add(result, timing.time_kernel(kernel, ops, place, limits))
        except Exception as error:
            result.failed = True
            result.lines.append(f"  {kernel.name}: {type(error).__name__}: {str(error)[:500]}")
    return result


def decode(asked: Asked) -> Result:
    """Steps of an engine with an 8B-shaped model, and what of them the host takes."""
    from tests.gpu import engine

    ops, place, limits, result = _ready(asked)
    for found in engine.time_decoding(ops, place, limits, (1, 64, 256) if place.type == "cuda" else (2,)):
        _add(result, found.step, engine.CORE)
        share = found.host_s / found.step.time_s
        name = found.step.name.replace("decode step", "host time of a decode step")
        result.lines += [f"  {name:48} {found.host_s * 1e6:10.1f} us  {share:6.1%}  of the step", *found.notes]
        result.entries[name] = _entry(found.host_s, share, 1.0, engine.CORE)
        result.failed |= place.type == "cuda" and bool(found.notes)
    return result


def requests(asked: Asked) -> Result:
    """A thousand requests, here and with transformers."""
    from tests.gpu import engine

    ops, place, limits, result = _ready(asked)
    found = engine.time_requests(ops, place, limits, asked.deadline)
    share = found.least_s / found.own_s
    name = f"{found.num_requests:,} requests of 8B"
    result.lines.append(f"  {name:40} {found.own_s:10.2f} s   {share:6.1%}  of the roofline")
    result.entries[name] = _entry(found.own_s, share, 0.55, engine.CORE)
    if found.peer_s is None:
        result.lines.append(f"  transformers' continuous batching did not run: {found.note}")
        result.failed = place.type == "cuda"
    else:
        more = "" if found.peer_finished else " at least (stopped at its deadline)"
        ratio = found.peer_s / found.own_s
        result.lines.append(f"  transformers' continuous batching: {found.peer_s:.2f} s, {ratio:.2f} times ours{more}")
        result.entries[name]["times_transformers"] = round(ratio, 3)
        result.entries[name]["transformers_finished"] = found.peer_finished
    return result


def sanitizer(asked: Asked) -> Result:
    """The smallest case of each op under memcheck: reads and writes outside of what was allocated."""
    program = next(filter(None, (shutil.which(SANITIZER, path=path) for path in _paths())), None)
    if program is None:
        return Result([f"left out: {SANITIZER} is not installed"])
    left = asked.deadline - time.time()
    command = [
        program,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "86",
        sys.executable,
        "-m",
        "tests.gpu.parts",
        "check",
    ]
    command += ["--backend", asked.backend, "--device", asked.device, "--seconds", f"{left:.0f}", "--one-each"]
    command += ["--only", asked.only, "--result", os.devnull]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    ending = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "cases hold" in line]
    lines = [f"{SANITIZER}: {line.strip('= ')}" for line in ending] or [done.stderr[-500:]]
    if done.returncode:
        lines += done.stdout.splitlines()[:20]
    return Result(lines, failed=done.returncode != 0)


def devices(asked: Asked) -> Result:
    """Sums over all GPUs that are here; they are the CUDA library's."""
    from tests.gpu import devices

    return Result(*devices.run()) if asked.backend == "cuda" else Result(["left out: the CUDA library's"])


def _paths() -> list[str | None]:
    return [None, *(str(folder / "bin") for folder in sorted(Path("/usr/local").glob("cuda*")))]


PARTS = {
    "check": check,
    "kernels": kernels,
    "devices": devices,
    "decode": decode,
    "requests": requests,
    "sanitizer": sanitizer,
}


def _ready(asked: Asked) -> tuple[Any, Any, Any, Result]:
    import torch

    from tests.gpu import timing

    place = torch.device(asked.device)
    ops = importlib.import_module(f"engines.{asked.backend}.opset").OpSet()
    limits = timing.ceilings(place)
    result = Result(ceilings={"copy_tb_s": limits.bytes_s / 1e12, "bf16_tflop_s": limits.flops_s / 1e12})
    return ops, place, limits, result


def _add(result: Result, timed: Any, core: tuple[str, ...] = ()) -> None:
    line = f"  {timed.name:40} {timed.time_s * 1e6:10.1f} us  {timed.fraction:6.1%}  (bar {timed.bar:.0%})"
    result.lines.append(line)
    result.entries[timed.name] = {**_entry(timed.time_s, timed.fraction, timed.bar, core), "own": timed.sources}


def _entry(seconds: float, fraction: float, bar: float, core: tuple[str, ...]) -> dict[str, Any]:
    return {"time_us": round(seconds * 1e6, 2), "fraction": round(fraction, 4), "bar": bar, "core": core, "own": ()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.parts")
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--one-each", action="store_true", help="one case of each op, all in this process")
    parser.add_argument("--result", type=Path, required=True)
    given = parser.parse_args()
    asked = Asked(given.backend, given.device, given.only, time.time() + given.seconds, given.one_each)
    with ExitStack() as stack:
        if given.device == "cpu":
            from tests.engines.triton.interpreter import repaired

            stack.enter_context(repaired())
        result = PARTS[given.part](asked)
    given.result.write_text(json.dumps(asdict(result)))
    for line in result.lines:
        print(line)
    return int(result.failed)


if __name__ == "__main__":
    raise SystemExit(main())
