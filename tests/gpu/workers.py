"""Work that may crash, hang, or lose the device, in processes of its own: what a piece breaks costs that piece."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

START_S = 120.0
"""In which a process has imported what it needs."""
MOST_LOST = 40
"""Processes: so many lost ones are one fault, and each costs its start."""


class DeviceLost(Exception):
    """Nothing works any more in this process."""


@dataclass(frozen=True)
class Lost:
    """What there is of a piece that gave no result."""

    why: str


@dataclass
class _Worker:
    process: Any
    connection: Connection
    item: int | None = None
    """What it works on; None: it starts, or waits for more."""
    ready: bool = False
    since: float = field(default_factory=time.time)


def each(
    setup: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
    items: Sequence[Any],
    processes: int,
    limit_s: float,
    deadline: float,
) -> Iterator[tuple[Any, Any]]:
    """(item, setup(*arguments)(item)) as they come, or (item, Lost), by the deadline, of time.time.

    limit_s: for one item; the process that takes longer is ended, as are those that die, and another goes on. setup,
    arguments, items and results are pickled.
    """
    items = list(items)
    todo = list(range(len(items)))[::-1]
    workers: list[_Worker] = []
    num_lost = 0
    try:
        while (todo or any(worker.item is not None for worker in workers)) and time.time() < deadline:
            while todo and len(workers) < min(processes, len(todo) + len(workers)) and num_lost <= MOST_LOST:
                workers.append(_start(setup, arguments))
            if not workers:
                yield from ((items[index], Lost("left out: too many processes were lost")) for index in reversed(todo))
                return
            wait([worker.connection for worker in workers], timeout=min(1.0, max(0.0, deadline - time.time())))
            for worker in list(workers):
                answer = _answer(worker, limit_s)
                if answer is None:
                    continue
                said, result = answer
                if worker.item is not None:
                    yield items[worker.item], result
                elif isinstance(result, Lost) and todo:
                    yield items[todo.pop()], Lost(f"its process did not start: {result.why}")
                worker.item, worker.since = None, time.time()
                if said == "lost":
                    num_lost += 1
                    _end(worker)
                    workers.remove(worker)
                elif todo:
                    worker.item = todo.pop()
                    worker.connection.send(items[worker.item])
    finally:
        for worker in workers:
            _end(worker)


def _answer(worker: _Worker, limit_s: float) -> tuple[str, Any] | None:
    """(ready, done or lost; the result) of a process that has something to say, or is overdue."""
    if worker.connection.poll():
        try:
            said, result = worker.connection.recv()
        except (EOFError, ConnectionError):
            worker.process.join(10)
            return "lost", Lost(f"its process ended with status {worker.process.exitcode}")
        worker.ready = True
        return said, result
    waits = worker.ready and worker.item is None
    allowed = limit_s if worker.ready else START_S
    if waits or time.time() - worker.since < allowed:
        return None
    return "lost", Lost(f"no result in {allowed:.0f} s: its process was ended")


def _start(setup: Callable[..., Any], arguments: tuple[Any, ...]) -> _Worker:
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, setup, arguments), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join(10)
    worker.connection.close()


def _work(connection: Connection, setup: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    try:
        work = setup(*arguments)
    except Exception as error:
        connection.send(("lost", Lost(f"{type(error).__name__}: {error}"[:500])))
        return
    connection.send(("ready", None))
    while True:
        item = connection.recv()
        try:
            said, result = "done", work(item)
        except DeviceLost as error:
            said, result = "lost", Lost(str(error))
        except Exception as error:
            said, result = "done", Lost(f"{type(error).__name__}: {error}"[:500])
        connection.send((said, result))
        if said == "lost":
            os._exit(1)  # the device's own clean-up may hang


def unless_lost(device: str, error: Exception) -> str:
    """What an error says. Raises DeviceLost where it has taken the device along."""
    import torch

    from engines.core.device import Device

    text = f"{type(error).__name__}: {error}"[:500]
    if Device(torch.device(device)).lost():
        raise DeviceLost(f"{text} (the device is lost with it)")
    return text


def prepared(device: str) -> ExitStack:
    """Makes a process ready for a device; what is given is to be kept while it is used."""
    import torch

    stack = ExitStack()
    torch.set_num_threads(2)  # others work beside this process
    if device == "cpu":
        from tests.engines.triton.interpreter import repaired

        stack.enter_context(repaired())
    else:
        torch.cuda.set_device(device)
    return stack
