"""Checks and times every GPU kernel and the engines: `python -m tests.gpu`, under nine minutes, no network.

    python -m tests.gpu --only attention      cases and kernels with this in their name
    python -m tests.gpu --parts decode        compile, first, check, families, kernels, decode, requests, ...
    python -m tests.gpu --interpret           Triton's kernels on the processor, small: that the command works

Each part is a process, and so is what may break the device in it; what it has found until then is kept. The ledger,
engines/gpu_ledger.json, is what was seen on GPUs: one entry for each kernel, with the hash of its sources, written
after each part. A run on a processor writes none. Exit code 1: a case failed, or time ran out.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engines.discover import names
from engines.gpu_ledger import FILE as LEDGER
from engines.platform import installed_extensions

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"triton": ROOT / "engines/triton", "cuda": ROOT / "csrc/cuda"}
MOST_S = {
    "compile": 180.0,
    "first": 60.0,
    "check": 150.0,
    "families": 120.0,
    "kernels": 100.0,
    "decode": 120.0,
    "requests": 120.0,
    "sanitizer": 120.0,
    "devices": 60.0,
}
"""For each part of one backend on a GPU. Right comes before fast: where time runs out, the last ones go."""
ENDING_S = 10.0
"""A part is told to be done so long before it is ended."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases and kernels whose name contains this")
    parser.add_argument("--parts", nargs="+", choices=tuple(MOST_S), help="all; with --only check and kernels")
    parser.add_argument("--backends", nargs="+", choices=tuple(FOLDERS), default=list(FOLDERS))
    parser.add_argument("--interpret", action="store_true", help="on the processor; writes no ledger")
    parser.add_argument("--seconds", type=float, default=480.0, help="stop before this; 480")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="another file for what is seen, begun as that one")
    parser.add_argument("--no-build", action="store_true", help="take the CUDA library as it is")
    asked = parser.parse_args()
    deadline = time.time() + asked.seconds
    asked.parts = asked.parts or (["check", "kernels"] if asked.only else list(MOST_S))
    if asked.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        asked.backends = ["triton"]
        asked.parts = [part for part in asked.parts if part not in ("compile", "sanitizer")]
    import torch

    if not asked.interpret and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; --interpret runs Triton's kernels on the processor")
        return 2
    missing = "cuda" in asked.backends and not built(asked.no_build)
    if missing:
        print("cuda: left out, its library is not here: nvcc is needed to build it")
        asked.backends = [backend for backend in asked.backends if backend != "cuda"]
    return int(run(asked, "cpu" if asked.interpret else "cuda:0", deadline) or missing)


def built(as_it_is: bool) -> bool:
    """Whether the CUDA library is here, compiled anew for this device alone where its sources have changed."""
    import torch

    if not as_it_is:
        major, minor = torch.cuda.get_device_capability()
        # From 9.0 on, kernels use what only that generation has.
        os.environ.setdefault("CSRC_CUDA_ARCHS", f"{major}{minor}{'a' if major >= 9 else ''}")
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        environment = {**os.environ, "DISABLE_CPU_EXTENSION": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(*(done.stdout + done.stderr).splitlines()[-20:], sep="\n")
    return "cuda" in installed_extensions()


def run(asked: argparse.Namespace, device: str, deadline: float) -> bool:
    """Whether something failed."""
    failed = False
    errors: dict[str, dict[str, float]] = {}
    # Every engine's correctness before any figure.
    for part in (part for part in MOST_S if part in asked.parts):
        for backend in asked.backends:
            left = deadline - time.time()
            seconds = left if device == "cpu" else min(MOST_S[part], left)
            if seconds <= 0:
                print(f"{backend}, {part}: left out, no time")
                failed = True
                continue
            print(f"{backend}, {part}: at most {seconds:.0f} s", flush=True)
            begin = time.time()
            result = one(part, backend, device, asked.only, seconds)
            failed |= result["failed"]
            for line in result["lines"]:
                print(f"  {line}")
            limits = "".join(f", {name} {value:.3f}" for name, value in result["ceilings"].items())
            print(f"    {time.time() - begin:.0f} s{limits}", flush=True)
            errors.setdefault(backend, {}).update(result["errors"])
            if device != "cpu" and result["entries"]:
                found = {f"{backend}: {n}": entry(backend, n, e, errors[backend]) for n, e in result["entries"].items()}
                write(found, device, result["ceilings"], asked.ledger)
    return failed


def one(part: str, backend: str, device: str, only: str, seconds: float) -> dict[str, Any]:
    """The result of a part: what it had found, and how it ended, if that was not by itself."""
    result: dict[str, Any] = {"failed": True, "lines": [], "ceilings": {}, "entries": {}, "errors": {}, "whole": False}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.parts", part, "--backend", backend]
        command += ["--device", device, "--only", only, "--seconds", str(max(seconds - ENDING_S, seconds / 2))]
        command += ["--result", str(file)]
        with (Path(folder) / "said").open("w+") as said:
            # A session of its own, so that what it started ends with it.
            process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
            try:
                ending = f"ended with status {process.wait(seconds)}"
            except subprocess.TimeoutExpired:
                ending = f"ended after its {seconds:.0f} s"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            said.seek(0)
            last = said.read().splitlines()[-15:]
        if file.exists():
            result = json.loads(file.read_text())
    if not result["whole"]:
        result["failed"] = True
        result["lines"] += [ending, *last]
    return result


OPS = {
    "decode": "paged_attention",
    "prefill": "paged_attention",
    "w4a16": "linear",
    "fp8": "linear",
    "experts": "fused_experts",
}
"""What a kernel's name begins with, where it is not the op."""


def entry(backend: str, name: str, found: dict[str, Any], worst: dict[str, float]) -> dict[str, Any]:
    """largest_error: of all cases of the op, in every dtype; None for a library, which has no cases."""
    own = [FOLDERS[backend] / file for file in found.pop("own")] or sorted(FOLDERS[backend].glob("*.*"))
    core = sorted(file for pattern in found.pop("core") for file in (ROOT / "engines").glob(pattern))
    first, theirs = name.split()[0], name.rpartition(", ")[2] in names("engines.triton.libraries")
    return {
        **found,
        "largest_error": None if theirs else worst.get(OPS.get(first, first)),
        "sources": hashlib.sha256(b"".join(file.read_bytes() for file in [*own, *core])).hexdigest()[:16],
    }


def write(entries: dict[str, dict[str, Any]], device: str, ceilings: dict[str, float], ledger: Path) -> None:
    """Into the ledger, over what it has of the same kernels."""
    import torch
    import transformers
    import triton

    program = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    where = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device),
        "driver": program.stdout.splitlines()[0] if program.returncode == 0 else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        **{name: round(value, 3) for name, value in ceilings.items()},
    }
    known = json.loads((ledger if ledger.exists() else LEDGER).read_text())
    known.update({name: {**where, **values} for name, values in entries.items()})
    partial = ledger.with_suffix(".partial")
    partial.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    partial.replace(ledger)
    print(f"    wrote {len(entries)} entries to {ledger.name}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
