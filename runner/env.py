"""`python -m runner.env`: what is installed, what the machine has, and which engines can run on it or why not.

The text to put into a report of a problem. Says nothing about any model: that is `python -m runner mode=plan`.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from importlib import metadata

from engines.platform import GIB, Host, probe
from runner.plan import ORDER
from runner.secrets import mask

PACKAGES = (
    "batch-inference-runner", "torch", "triton", "transformers", "tokenizers", "safetensors", "pyarrow", "datasets",
    "fsspec", "hydra-core", "omegaconf", "jinja2", "numpy", "flash_attn_3", "flashinfer-python",
)  # fmt: skip
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TOKENIZERS_PARALLELISM",
)  # fmt: skip


def report() -> str:
    host = probe()
    lines = [f"python {platform.python_version()} on {platform.platform()}", "", "Packages:"]
    lines += [f"  {name:<24}{installed(name)}" for name in PACKAGES]
    lines += ["", "Machine:", *(f"  {line}" for line in _machine(host)), "", "Engines:"]
    for name in ORDER:
        lines += _engine(name, host)
    settings = [f"  {name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return mask("\n".join([*lines, "", "Environment:", *(settings or ["  nothing that changes how jobs run"])]))


def _machine(host: Host) -> list[str]:
    lines = [
        f"{host.cpu_name or 'processor'}: {host.cpu_cores} cores, {host.cpu_memory_bytes / GIB:.1f} GiB free; "
        f"multiplies {', '.join(sorted(host.cpu_dtypes))}"
    ]
    if host.device == "cpu":
        lines.append("no accelerator")
    else:
        capability = ".".join(map(str, host.compute_capability or ()))
        generation = f", compute capability {capability}" if capability else ""
        lines.append(
            f"{host.num_devices} x {host.device_name} ({host.device}{generation}): {host.memory_bytes / GIB:.1f} GiB, "
            f"{host.free_bytes / GIB:.1f} GiB free; CUDA {host.cuda or 'unknown'}"
        )
    lines.append(f"compiled libraries: {', '.join(sorted(host.extensions)) or 'none'}")
    return lines + list(host.problems)


def _engine(name: str, host: Host) -> list[str]:
    offer = importlib.import_module(f"engines.{name}.offers").offers(host)
    if offer.blockers:
        return [f"  {name:<8}not here:", *(f"    {blocker}" for blocker in offer.blockers)]
    return [f"  {name:<8}ready", *(f"    {note}" for note in offer.notes)]


def installed(package: str) -> str:
    """The version of a distribution, or that there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
    sys.exit(0)
