"""One part of `python -m tests.gpu`, in a process of its own: an error of the device ends with it.

    python -m tests.gpu.parts check --backend triton --seconds 100 --result FILE

The result is JSON, written anew whenever there is more of it: lines to print, entries for the ledger, whether something
failed, and whether it is whole.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SANITIZER = "compute-sanitizer"
"""Among the programs on PATH or in a CUDA toolkit."""
KERNEL_S, ENGINE_S = 60.0, 150.0
"""For one kernel, with its compilation; for one batch size of an engine, with load and capture."""
PEER_END_S = 20.0
"""In which transformers' engine has stopped, once it was told to."""
MOST_LINES = 40
"""Of cases that do not hold."""


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
    whole: bool = False
    """Whether the part has come to its end."""


@dataclass(frozen=True)
class Asked:
    backend: str
    device: str
    only: str
    deadline: float
    one_each: bool
    file: Path | None = None
    """Where the result goes."""

    def save(self, result: Result) -> None:
        if self.file is not None and self.file != Path(os.devnull):
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(result)))
            partial.replace(self.file)


def compiled(asked: Asked) -> Result:
    """What Triton's launches compile, into its cache, with all processors at once."""
    if asked.backend != "triton" or asked.device == "cpu":
        return Result(["left out: nothing is compiled when it is launched"])
    import torch

    from tests.engines.triton import launched

    major, minor = torch.cuda.get_device_capability(asked.device)
    sm = major * 10 + minor
    found = [variant for part in launched.PARTS.values() for variant in part(sm, asked.only)]
    result = Result([f"0 of {len(found)} kernels compiled for sm {sm}"])
    made = launched.compile_all(found, os.cpu_count() or 1, asked.deadline)
    for done, (variant, problem) in enumerate(made, 1):
        if problem:
            result.failed = True
            result.lines.append(f"  {variant.name} {variant.constants}: {problem}"[:1000])
        # What is not compiled now is compiled when it is launched.
        result.lines[0] = f"{done} of {len(found)} kernels compiled for sm {sm}"
        asked.save(result)
    return result


def first(asked: Asked) -> Result:
    """What the CUDA kernels take the hardware to be."""
    from tests.gpu import first

    if asked.backend != "cuda":
        return Result(["left out: the CUDA library's"])
    return Result(*first.run(asked.deadline - time.time()))


def check(asked: Asked) -> Result:
    """Every case of every op against float64."""
    from tests.gpu import checking

    ops = checking.opset(asked.backend)
    expected = len(checking.todo(asked.backend, ops, asked.only, asked.one_each))
    result, held, seen = Result([f"0 of {expected} cases hold"]), 0, 0
    for finding in checking.check_all(asked.backend, asked.device, asked.only, asked.deadline, asked.one_each):
        seen, held = seen + 1, held + (not finding.problem)
        result.lines[0] = f"{held} of {expected} cases hold" + (f", {seen - held} do not" if held < seen else "")
        if finding.problem and len(result.lines) <= MOST_LINES:
            result.lines.append(f"  {finding.case} {finding.dtype}: {finding.problem}")
        op = finding.case.split("-")[0]
        result.errors[op] = max(result.errors.get(op, 0.0), finding.error)
        asked.save(result)
    result.failed = held < expected
    return result


def families(asked: Asked) -> Result:
    """Every family of models by an engine, tiny, against the reference."""
    from tests.gpu import models, workers

    names = [name for name in models.families(asked.backend) if asked.only in name]
    processes = max(1, min(8, (os.cpu_count() or 2) // 2))
    result, held, left = Result([f"0 of {len(names)} families hold"]), 0, set(names)
    given = (asked.backend, asked.device)
    for name, ran in workers.each(models.runner, given, names, processes, ENGINE_S, asked.deadline):
        left.remove(name)
        if isinstance(ran, workers.Lost):
            result.lines.append(f"  {name}: {ran.why}")
        else:
            held += 1
            result.lines += [f"  {name}: {note}" for note in ran.notes]
        result.lines[0] = f"{held} of {len(names)} families hold"
        asked.save(result)
    if left:
        result.lines.append(f"  left out, no time: {', '.join(sorted(left))}")
    result.failed = held < len(names)
    return result


def kernels(asked: Asked) -> Result:
    """Each kernel against the device's limits."""
    from tests.gpu import timing, workers

    limits, result = _ready(asked)
    names = [kernel.name for kernel in timing.kernels_of(asked.backend) if asked.only in kernel.name]
    for name, timed in workers.each(
        timing.timer, (asked.backend, asked.device, limits), names, 1, KERNEL_S, asked.deadline
    ):
        names.remove(name)
        if isinstance(timed, workers.Lost):
            result.failed = True
            result.lines.append(f"  {name}: {timed.why}")
        else:
            _add(result, timed)
        asked.save(result)
    if names:
        result.failed = True
        result.lines.append(f"  {len(names)} kernels left out, no time: {', '.join(names)}")
    return result


def decode(asked: Asked) -> Result:
    """Steps of an engine with an 8B-shaped model, and what of them the host takes."""
    from tests.gpu import engine, workers

    limits, result = _ready(asked)
    counts = [1, 64, 256] if asked.device != "cpu" else [2]
    given = (asked.backend, asked.device, limits)
    for count, found in workers.each(engine.decoder_timer, given, list(counts), 1, ENGINE_S, asked.deadline):
        counts.remove(count)
        if isinstance(found, workers.Lost):
            result.failed = True
            result.lines.append(f"  decode step of 8B, batch {count}: {found.why}")
        else:
            _add(result, found.step, engine.CORE)
            share = found.host_s / found.step.time_s
            name = found.step.name.replace("decode step", "host time of a decode step")
            result.lines += [f"  {name:48} {found.host_s * 1e6:10.1f} us  {share:6.1%}  of the step", *found.notes]
            result.entries[name] = _entry(found.host_s, share, 1.0, engine.CORE)
            result.failed |= asked.device != "cpu" and bool(found.notes)
        asked.save(result)
    if counts:
        result.failed = True
        result.lines.append(f"  batches left out, no time: {', '.join(map(str, counts))}")
    return result


def requests(asked: Asked) -> Result:
    """A thousand requests, here and with transformers."""
    from tests.gpu import engine, workers

    limits, result = _ready(asked)
    given = (asked.backend, asked.device, limits, asked.deadline - PEER_END_S)
    name, own, left = "", None, ["own", "peer"]
    for which, found in workers.each(engine.requests_timer, given, left, 1, 1e9, asked.deadline):
        left.remove(which)
        if isinstance(found, workers.Lost):
            result.failed |= which == "own" or asked.device != "cpu"
            result.lines.append(f"  requests, {which}: {found.why}")
        elif which == "own":
            own, share, name = found, found.least_s / found.time_s, f"{found.num_requests:,} requests of 8B"
            result.lines.append(f"  {name:40} {found.time_s:10.2f} s   {share:6.1%}  of the roofline  (bar 55%)")
            result.entries[name] = _entry(found.time_s, share, 0.55, engine.CORE)
        else:
            more = "" if found.finished else " at least (stopped at its deadline)"
            result.lines.append(f"  transformers' continuous batching: {found.time_s:.2f} s{more}")
            if own is not None:
                ratio = found.time_s / own.time_s
                result.lines[-1] += f", {ratio:.2f} times ours"
                result.entries[name]["times_transformers"] = round(ratio, 3)
                result.entries[name]["transformers_finished"] = found.finished
        asked.save(result)
    result.failed |= own is None or bool(left)
    result.lines += [f"  requests, {which}: left out, no time" for which in left]
    return result


def sanitizer(asked: Asked) -> Result:
    """The smallest case of each op under memcheck: reads and writes outside of what was allocated."""
    program = next(filter(None, (shutil.which(SANITIZER, path=path) for path in _paths())), None)
    if program is None:
        return Result([f"left out: {SANITIZER} is not installed"])
    left = asked.deadline - time.time()
    command = [program, "--tool", "memcheck", "--error-exitcode", "86", sys.executable, "-m", "tests.gpu.parts"]
    command += ["check", "--backend", asked.backend, "--device", asked.device, "--seconds", f"{left * 0.8:.0f}"]
    command += ["--one-each", "--only", asked.only, "--result", os.devnull]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    ending = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "cases hold" in line]
    lines = [f"{SANITIZER}: {line.strip('= ')}" for line in ending] or [done.stderr[-500:]]
    if done.returncode:
        lines += done.stdout.splitlines()[:MOST_LINES]
    return Result(lines, failed=done.returncode != 0)


def devices(asked: Asked) -> Result:
    """Sums over all GPUs that are here; they are the CUDA library's."""
    from tests.gpu import devices

    return Result(*devices.run()) if asked.backend == "cuda" else Result(["left out: the CUDA library's"])


def _paths() -> list[str | None]:
    toolkits = sorted(Path("/usr/local").glob("cuda*"))
    return [None, *(str(folder / place) for folder in toolkits for place in ("bin", SANITIZER))]


PARTS = {
    "compile": compiled,
    "first": first,
    "check": check,
    "families": families,
    "kernels": kernels,
    "decode": decode,
    "requests": requests,
    "sanitizer": sanitizer,
    "devices": devices,
}


def _ready(asked: Asked) -> tuple[Any, Result]:
    """(the device's limits, a result that says them)."""
    import torch

    from tests.gpu import timing

    limits = timing.ceilings(torch.device(asked.device))
    if asked.device != "cpu":
        torch.cuda.empty_cache()  # another process computes
    return limits, Result(ceilings={"copy_tb_s": limits.bytes_s / 1e12, "bf16_tflop_s": limits.flops_s / 1e12})


def _add(result: Result, timed: Any, core: tuple[str, ...] = ()) -> None:
    line = f"  {timed.name:40} {timed.time_s * 1e6:10.1f} us  {timed.fraction:6.1%}  (bar {timed.bar:.0%})"
    result.lines.append(line + ("  below" if timed.fraction < timed.bar else ""))
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
    deadline = time.time() + given.seconds
    asked = Asked(given.backend, given.device, given.only, deadline, given.one_each, given.result)
    result = replace(PARTS[given.part](asked), whole=True)
    asked.save(result)
    for line in result.lines:
        print(line)
    return int(result.failed)


if __name__ == "__main__":
    raise SystemExit(main())
