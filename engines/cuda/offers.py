"""What the CUDA engine offers on a host. Its op set is not part of this version: no op is offered, and it says so."""

from __future__ import annotations

from dataclasses import dataclass

from engines.api import EngineConfig
from engines.capability import Allowed, Offer
from engines.discover import names
from engines.platform import CUDA_EXTENSION, Host, cuda_blockers


@dataclass(frozen=True)
class Config(EngineConfig):
    """Settings of the CUDA engine: those that all engines share."""


MINIMUM = (8, 0)
OPS: dict[str, dict[str, Allowed]] = {}


def offers(host: Host) -> Offer:
    blockers = cuda_blockers(host, MINIMUM)
    if "opset" not in names("engines.cuda"):
        blockers.append("the cuda engine is not part of this version: there is no engines/cuda/opset.py")
    elif CUDA_EXTENSION not in host.extensions:
        blockers.append("compiled extension absent: reinstall with nvcc on PATH")
    return Offer(
        engine="cuda",
        ops=OPS,
        blockers=tuple(blockers),
        sm=host.compute_capability,
        since={"bfloat16": (8, 0), "fp8": (8, 9)},
    )
