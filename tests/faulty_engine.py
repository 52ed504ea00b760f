"""Engines for a process of their own, that end it, hang it or fail in it: a prompt's first letter says how.

Loaders are functions of a module, as that process imports them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engines.api import CheckpointError, EngineSettings, EngineStats, Outcome, Request
from runner.engine_main import Watch
from tests.fake_engine import FakeEngine

PIDS = "FAULTY_ENGINE_PIDS"
"""Environment variable: a file that gets the id of each process that loads such an engine."""
LARGEST_STEP = 4
"""Requests of a step that ends the process of `load_hungry`."""


class FaultyEngine(FakeEngine):
    """A FakeEngine that computes a few requests at a time, and does what their prompts begin with.

    S: segmentation fault. K: SIGKILL. X: leaves with exit code 3. H: hangs. R: raises.
    """

    def __init__(self, watch: Watch, max_num_seqs: int) -> None:
        super().__init__(per_step=max_num_seqs)
        self.watch = watch
        self.notes: tuple[str, ...] = ()

    def step(self) -> list[Outcome]:
        now = self._queue[-self._per_step :]
        self.watch([request.request_id for request in now])
        for request in now:
            FAULTS.get(first_letter(request), lambda: None)()
        return super().step()

    def stats(self) -> EngineStats:
        return replace(super().stats(), notes=self.notes)


def first_letter(request: Request) -> str:
    """Of the prompt, with the tokenizer of tests.small_job."""
    return chr(request.token_ids[0] + 33)


def _fail() -> None:
    raise RuntimeError("a defect of the engine")


def this_hangs() -> None:
    """Its name is looked for in the stacks."""
    time.sleep(3600)


FAULTS: dict[str, Callable[[], object]] = {
    "S": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "K": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "X": lambda: os._exit(3),
    "H": this_hangs,
    "R": _fail,
}


def load(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> FaultyEngine:
    """A FaultyEngine of the settings' max_num_seqs."""
    if PIDS in os.environ:
        with Path(os.environ[PIDS]).open("a") as file:
            file.write(f"{os.getpid()}\n")
    permission()
    return FaultyEngine(watch, settings.config.max_num_seqs)


def load_hungry(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> FaultyEngine:
    """One that the system kills for its memory when it computes more than LARGEST_STEP requests at once."""
    engine = load(settings, watch, permission)

    def look(request_ids: object) -> None:
        watch(request_ids)  # type: ignore[arg-type]
        if len(request_ids) > LARGEST_STEP:  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGKILL)

    engine.watch = look
    return engine


def load_shrunk(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> FaultyEngine:
    """One that had to depart from its settings."""
    engine = load(settings, watch, permission)
    engine.notes = ("no memory for a KV cache of 8 blocks: going on with 4",)
    return engine


def load_slowly(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> FaultyEngine:
    """One that takes an hour to load."""
    permission()
    time.sleep(3600)
    raise AssertionError


def load_dies(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> FaultyEngine:
    """One that ends its process while it is being loaded."""
    permission()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def load_no_memory(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> FaultyEngine:
    """One for which there is no memory."""
    raise MemoryError("no room")


def load_old_library(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> FaultyEngine:
    """One whose compiled library cannot be used."""
    raise OSError("_ops.so: built from other sources; expected those here; build it again")


def load_bad_checkpoint(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> FaultyEngine:
    """One of a checkpoint that is broken."""
    raise CheckpointError("w: expected a tensor")


def load_dies_always(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> FaultyEngine:
    """One that can compute nothing at all."""
    engine = load(settings, watch, permission)
    engine.watch = lambda request_ids: (watch(request_ids), os._exit(9))  # type: ignore[assignment, func-returns-value]
    return engine


def load_slow(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> FaultyEngine:
    """One whose steps take 5 ms, and that notes at its end how many requests it had."""
    engine = load(settings, watch, permission)
    engine.on_step = lambda: time.sleep(0.005)
    step, done = engine.step, [0]
    shares = Path(os.environ[PIDS] + ".shares")

    def counting() -> list[Outcome]:
        outcomes = step()
        done[0] += len(outcomes)
        shares.with_name(f"{shares.name}.{os.getpid()}").write_text(f"{os.getpid()} {done[0]}\n")
        return outcomes

    engine.step = counting  # type: ignore[method-assign]
    return engine


def load_sleepy(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> FaultyEngine:
    """One whose steps take 50 ms."""
    engine = load(settings, watch, permission)
    engine.on_step = lambda: time.sleep(0.05)
    return engine
