"""What the Triton engine offers on a host. Its op set is not part of this version: no op is offered, and it says so."""

from __future__ import annotations

from dataclasses import dataclass

from engines.api import EngineConfig
from engines.capability import Allowed, Offer
from engines.discover import names
from engines.platform import Host, cuda_blockers


@dataclass(frozen=True)
class Config(EngineConfig):
    """Settings of the Triton engine: those that all engines share."""


MINIMUM = (7, 5)
OPS: dict[str, dict[str, Allowed]] = {}


def offers(host: Host) -> Offer:
    blockers = cuda_blockers(host, MINIMUM)
    if "opset" not in names("engines.triton"):
        blockers.append("the triton engine is not part of this version: there is no engines/triton/opset.py")
    elif not host.triton:
        blockers.append("triton is not installed: pip install triton")
    return Offer(
        engine="triton",
        ops=OPS,
        blockers=tuple(blockers),
        sm=host.compute_capability,
        since={"bfloat16": (8, 0), "fp8": (8, 9)},
    )
