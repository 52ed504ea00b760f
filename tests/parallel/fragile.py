"""Engines of several ranks of which one is lost; loaders are functions of a module, as the engine's process imports
them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from engines.api import Engine, EngineSettings
from runner import engine_main
from runner.engine_main import Watch

PIDS = "FRAGILE_PIDS"
"""Environment variable: a file that gets the ids of the followers of each engine, a line each."""


def load(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> Engine:
    """The engine as it is."""
    engine = engine_main.load(settings, watch, permission)
    with Path(os.environ[PIDS]).open("a") as file:
        file.write(" ".join(map(str, _children())) + "\n")
    return engine


def load_and_lose(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> Engine:
    """The first engine loses a follower once it is loaded."""
    return _load_and(signal.SIGKILL, settings, watch, permission)


def load_and_stop(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> Engine:
    """A follower of the first engine does not answer any more."""
    return _load_and(signal.SIGSTOP, settings, watch, permission)


def load_and_lose_always(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> Engine:
    """A follower ends while weights are being read, whatever is tried."""

    def permit() -> None:
        permission()
        os.kill(_children()[0], signal.SIGKILL)

    return load(settings, watch, permit)


def _load_and(number: signal.Signals, settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> Engine:
    first = not Path(os.environ[PIDS]).exists()
    engine = load(settings, watch, permission)
    if first:
        os.kill(_children()[0], number)
    return engine


def _children() -> list[int]:
    """Of this process (proc(5)), in the order of their start."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return sorted(found)
