"""Engines of several ranks of which one is lost; loaders are functions of a module, as the engine's process imports
them."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from engines.api import EngineSettings, Outcome, Request, RoleEngine
from runner import engine_main
from runner.engine_main import Watch

PIDS = "FRAGILE_PIDS"
"""Environment variable: a file that gets the ids of the followers of each engine, a line each."""


def load(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> RoleEngine:
    """The engine as it is."""
    engine = engine_main.load(settings, watch, permission)
    with Path(os.environ[PIDS]).open("a") as file:
        file.write(" ".join(map(str, _children())) + "\n")
    return engine


def load_and_lose(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> RoleEngine:
    """The first engine loses a follower once it is loaded."""
    return _load_and(signal.SIGKILL, settings, watch, permission)


def load_and_stop(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> RoleEngine:
    """A follower of the first engine does not answer any more."""
    return _load_and(signal.SIGSTOP, settings, watch, permission)


def load_and_lose_always(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> RoleEngine:
    """A follower ends while weights are being read, whatever is tried."""

    def permit() -> None:
        permission()
        os.kill(_children()[0], signal.SIGKILL)

    return load(settings, watch, permit)


def _load_and(
    number: signal.Signals, settings: EngineSettings, watch: Watch, permission: Callable[[], None]
) -> RoleEngine:
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


ROLE = "FRAGILE_ROLE"
"""Environment variable: the role of the engine that ends."""
MARK = ord("#") - 33
"""The token of tests.small_job's tokenizer that ends an engine."""


def load_and_end(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> RoleEngine:
    """The first engine of the role ends in the middle of its work."""
    engine = engine_main.load(settings, watch, permission)
    if settings.role == os.environ[ROLE] and not Path(os.environ[PIDS]).exists():
        Path(os.environ[PIDS]).touch()
        step, calls = engine.step, itertools.count()

        def step_or_end() -> list[Outcome]:
            if next(calls) == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return step()

        engine.step = step_or_end  # type: ignore[method-assign]
    return engine


def load_and_choke(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> RoleEngine:
    """Each engine of the role that computes the MARK ends."""
    marked: set[int] = set()

    def watch_for_mark(request_ids: Sequence[int]) -> None:
        watch(request_ids)
        if settings.role == os.environ[ROLE] and not marked.isdisjoint(request_ids):
            os.kill(os.getpid(), signal.SIGKILL)

    engine = engine_main.load(settings, watch_for_mark, permission)
    submit = engine.submit

    def submit_and_mark(requests: Sequence[Request]) -> None:
        marked.update(request.request_id for request in requests if MARK in request.token_ids)
        submit(requests)

    engine.submit = submit_and_mark  # type: ignore[method-assign]
    return engine
