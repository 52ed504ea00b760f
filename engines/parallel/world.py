"""Ranks that something else has started, one process each: what its environment variables say. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Launch = Literal["spawn", "srun", "torchrun"]
FIRST_PORT, NUM_PORTS = 20_000, 10_000
"""Ports that jobs of srun meet at: below those that Linux gives to connections (from 32768)."""


@dataclass(frozen=True)
class World:
    """One process among those of a job, and where they meet."""

    rank: int
    size: int
    local_rank: int
    """Among those of its node."""
    address: str
    port: int


def world(launch: Launch, environment: Mapping[str, str]) -> World:
    """With srun, ranks meet on the first host of the step, or at MASTER_ADDR and MASTER_PORT where they are set.

    Raises ValueError, worded for a person, for variables that are missing or no numbers.
    """
    if launch == "torchrun":
        named = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
        rank, size, local, port = _numbers(launch, environment, named)
        return World(rank, size, local, environment["MASTER_ADDR"], port)
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST")
    rank, size, local, job, step = _numbers(launch, environment, names)
    address = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    port = int(environment.get("MASTER_PORT") or FIRST_PORT + (job * 17 + step) % NUM_PORTS)
    return World(rank, size, local, address, port)


def _numbers(launch: Launch, environment: Mapping[str, str], names: tuple[str, ...]) -> list[int]:
    """Of all variables but the last, which is text."""
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise ValueError(
            f"parallelism.launch: {launch}, and {', '.join(missing)} is not set; expected a process that {launch} has "
            "started; start it so, or set parallelism.launch=spawn"
        )
    try:
        return [int(environment[name]) for name in names[:-1]]
    except ValueError as error:
        raise ValueError(
            f"parallelism.launch: {launch}: {error}; expected numbers in {', '.join(names[:-1])}"
        ) from None


def first_host(nodes: str) -> str:
    """The first of a list as Slurm writes it: "gpu[03-05,09],x1" -> "gpu03" (slurm.conf(5), NodeName)."""
    found = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\]([^,\[]*))?", nodes)
    assert found is not None
    return "".join(part or "" for part in found.groups())
