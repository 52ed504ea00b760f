"""How the threads of OpenMP, which torch computes with, wait for each other."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPIN_COUNT = "10000"
"""Turns of libgomp's waiting loop, about half a millisecond: longer than the gap between two ops of a step."""


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have waiting threads sleep after half a millisecond; to be called before torch is imported.

    By default libgomp's threads spin for tens of milliseconds. When another program wants the processor, even one of
    the lowest priority, a spinning thread loses its turn to it and the next op waits for that thread: steps took 20
    times as long beside one niced process, and take 3 times as long with this. Alone it costs nothing that can be told
    from noise. Leaves alone what the user has set: GOMP_SPINCOUNT, OMP_WAIT_POLICY.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
