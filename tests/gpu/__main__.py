"""Checks and times every GPU kernel: `python -m tests.gpu`. One command, under nine minutes, no network.

    python -m tests.gpu --only attention      cases and kernels with this in their name
    python -m tests.gpu --interpret           Triton's kernels on the processor, small: that the command works

The ledger, engines/gpu_ledger.json, is what was seen on GPUs: one entry for each kernel, with the hash of its sources.
A run on a processor writes none. Exit code 1: a case failed, or something was left out for lack of time.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engines.gpu_ledger import FILE as LEDGER

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"triton": ROOT / "engines/triton", "cuda": ROOT / "csrc/cuda"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases and kernels whose name contains this")
    parser.add_argument("--backends", nargs="+", choices=tuple(FOLDERS), default=list(FOLDERS))
    parser.add_argument("--interpret", action="store_true", help="on the processor; writes no ledger")
    parser.add_argument("--seconds", type=float, default=480.0, help="stop before this; 480")
    parser.add_argument("--no-build", action="store_true", help="take the CUDA library as it is")
    asked = parser.parse_args()
    if asked.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        asked.backends = ["triton"]
    import torch

    if not asked.interpret and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; --interpret runs Triton's kernels on the processor")
        return 2
    if "cuda" in asked.backends and not asked.no_build:
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True)
    return run(asked, torch.device("cpu" if asked.interpret else "cuda:0"))


def run(asked: argparse.Namespace, device: Any) -> int:
    from tests.gpu import checking, timing

    deadline = time.time() + asked.seconds
    failed = False
    entries: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        if asked.interpret:
            from tests.engines.triton.interpreter import repaired

            stack.enter_context(repaired())
        limits = timing.ceilings(device)
        print(f"copy {limits.bytes_s / 1e12:.3f} TB/s, bfloat16 product {limits.flops_s / 1e12:.1f} TFLOP/s")
        for backend in asked.backends:
            # Half of the time for correctness, shared by those that are still to come.
            left = (deadline - time.time()) / 2 / (len(asked.backends) - asked.backends.index(backend))
            findings = checking.check_all(backend, str(device), asked.only, left)
            wrong = [finding for finding in findings if finding.problem]
            expected = checking.count(backend, asked.only)
            print(f"{backend}: {len(findings) - len(wrong)} of {expected} cases hold")
            for finding in wrong:
                print(f"  {finding.case} {finding.dtype}: {finding.problem}")
            failed |= bool(wrong) or len(findings) < expected
            worst: dict[str, float] = {}
            for finding in findings:
                op = finding.case.split("-")[0]
                worst[op] = max(worst.get(op, 0.0), finding.error)
            for timed in times(backend, asked, device, limits, deadline):
                print(f"  {timed.name:40} {timed.time_s * 1e6:10.1f} us  {timed.fraction:6.1%}  (bar {timed.bar:.0%})")
                entries[f"{backend}: {timed.name}"] = entry(backend, timed, worst)
    if device.type == "cuda":
        write(entries, device, limits)
    return int(failed)


def times(backend: str, asked: argparse.Namespace, device: Any, limits: Any, deadline: float) -> list[Any]:
    """Kernels first, then whole steps; what the deadline leaves."""
    from tests.gpu import timing

    ops = importlib.import_module(f"engines.{backend}.opset").OpSet()
    results = []
    for kernel in importlib.import_module(f"tests.engines.{backend}.kernels").KERNELS:
        if asked.only in kernel.name and time.time() < deadline:
            results.append(timing.time_kernel(kernel, ops, device, limits))
    if asked.only in "decode step of 8B" and time.time() < deadline:
        results += timing.time_decoding(ops, device, limits, (1, 64) if device.type == "cuda" else (2,))
    return results


OPS = {
    "decode": "paged_attention",
    "prefill": "paged_attention",
    "w4a16": "linear",
    "fp8": "linear",
    "experts": "fused_experts",
}
"""What a kernel's name begins with, where it is not the op."""


def entry(backend: str, timed: Any, worst: dict[str, float]) -> dict[str, Any]:
    """largest_error: of all cases of the kernel's op, in every dtype."""
    first = timed.name.split()[0]
    files = [FOLDERS[backend] / name for name in timed.sources] or sorted(FOLDERS[backend].glob("*.*"))
    return {
        "time_us": round(timed.time_s * 1e6, 2),
        "fraction": round(timed.fraction, 4),
        "bar": timed.bar,
        "largest_error": worst.get(OPS.get(first, first)),
        "sources": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16],
    }


def write(entries: dict[str, dict[str, Any]], device: Any, limits: Any) -> None:
    """Into the ledger, over what it has of the same kernels."""
    import torch
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
        "copy_tb_s": round(limits.bytes_s / 1e12, 3),
        "bf16_tflop_s": round(limits.flops_s / 1e12, 1),
    }
    known = json.loads(LEDGER.read_text())
    known.update({name: {**where, **values} for name, values in entries.items()})
    LEDGER.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    print(f"wrote {len(entries)} entries to {LEDGER.relative_to(ROOT)}")


if __name__ == "__main__":
    raise SystemExit(main())
