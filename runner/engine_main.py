"""The process that an engine lives in: requests come over a connection, outcomes go back. runner/workers.py starts it.

    loader, settings -> (imports) -> permission to load -> Loaded -> requests, Releases ... -> Reports

The connection is an unnamed pair of sockets between a process and its own child: nobody else can write to it, which is
why its messages may be pickles. Terminal and system signals are the parent's business: this process leaves when the
connection ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import queue
import signal
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import starmap
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any

from engines.api import (
    CheckpointError,
    EngineSettings,
    EngineStats,
    Outcome,
    Request,
    RoleEngine,
    UnsupportedModelError,
)
from engines.child import die_with_parent, leave_signals_to_parent

REPORT_INTERVAL_S = 0.05
"""Outcomes are kept back this long while the engine has work waiting: fewer wake-ups of the parent."""
STATS_INTERVAL_S = 0.5
STACKS_SIGNAL = signal.SIGUSR2
"""Has the stacks of all threads written to the standard error, whatever the process is doing."""

Watch = Callable[[Sequence[int]], None]
Loader = Callable[[EngineSettings, Watch, Callable[[], None]], RoleEngine]
"""Makes the engine: a function of a module. Its arguments: the settings; `engines.load.load_engine`'s watch; what waits
until weights may be loaded, to be called once, after what can be done before."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The engine is ready."""

    max_model_len: int
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Report:
    """What came back since the last one."""

    outcomes: list[tuple[Any, ...]]
    """As `pack` gives them."""
    stats: EngineStats
    num_received: int
    """Requests taken so far."""
    num_unfinished: int
    fetched: list[int]
    """As RoleEngine.fetched gives them."""


@dataclass(frozen=True, slots=True)
class Release:
    """To the process: as RoleEngine.release."""

    request_ids: list[int]


@dataclass(frozen=True, slots=True)
class Failure:
    """The last message of a process that cannot go on."""

    loading: bool
    kind: str
    """checkpoint, unsupported, engine or other: who must act."""
    message: str
    traceback: str


def load(settings: EngineSettings, watch: Watch, permission: Callable[[], None]) -> RoleEngine:
    """The engine of the settings, as engines.load.load_engine gives it."""
    from engines.load import import_opset, load_engine
    from engines.parallel import launch

    ranks = launch.start(settings)
    import_opset(settings.backend)
    permission()
    return load_engine(settings, Detokenizer(settings.model_path), watch, ranks.meet())


class Detokenizer:
    """Text of tokens, for stop strings. The tokenizer is read when the first request has one."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._decode: Callable[[Sequence[int]], str] | None = None

    def __call__(self, token_ids: Sequence[int]) -> str:
        if self._decode is None:
            from runner.prompt import load_tokenizer

            self._decode = load_tokenizer(self._path).decode
        return self._decode(token_ids)


def serve(connection: Connection, trace_file: int) -> None:
    """Be the process: returns when the engine has failed; leaves the interpreter when the parent goes."""
    leave_signals_to_parent()
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    die_with_parent()
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    channel = Channel(connection, inbox.put, lambda: os._exit(0))
    trace, loading = Trace(trace_file), True
    try:
        loader, settings = inbox.get()
        engine = loader(settings, trace.note, inbox.get)
        channel.send(Loaded(engine.max_model_len, engine.stats()))
        loading = False
        for report in _reports(engine, trace, inbox):
            channel.send(report)
    except Exception as error:
        kind, text = _kind(error), str(error)
        if not (loading and text) or kind == "other":
            text = f"{type(error).__name__}: {text}"
        channel.send(Failure(loading, kind, text, traceback.format_exc()))
        channel.flush()


def _reports(engine: RoleEngine, trace: Trace, inbox: queue.SimpleQueue[Any]) -> Iterator[Report]:
    """Steps without end."""
    finished: list[Outcome] = []
    fetched: list[int] = []
    num_received, reported = 0, time.monotonic()
    while True:
        while not inbox.empty() or not engine.num_unfinished:
            num_received += _take(inbox.get(), engine, trace)
        if engine.stalled:
            with contextlib.suppress(queue.Empty):
                num_received += _take(inbox.get(timeout=REPORT_INTERVAL_S), engine, trace)
        trace.step()
        finished += engine.step()
        fetched += engine.fetched()
        stats, silent = engine.stats(), time.monotonic() - reported
        hungry = not stats.num_waiting or not engine.num_unfinished
        if silent >= STATS_INTERVAL_S or ((finished or fetched) and (hungry or silent >= REPORT_INTERVAL_S)):
            yield Report(pack(finished), stats, num_received, engine.num_unfinished, fetched)
            finished, fetched, reported = [], [], time.monotonic()
        elif not engine.num_unfinished:
            yield Report([], stats, num_received, 0, [])


def _take(message: Any, engine: RoleEngine, trace: Trace) -> int:
    """Do what a message says: how many requests it brought."""
    if isinstance(message, Release):
        engine.release(message.request_ids)
        return 0
    requests = unpack(Request, message)
    trace.note([request.request_id for request in requests])
    engine.submit(requests)
    return len(requests)


def _kind(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return "checkpoint"
    if isinstance(error, UnsupportedModelError):
        return "unsupported"
    # OSError: a library that does not load or is out of date, a file that cannot be read.
    return "engine" if isinstance(error, (MemoryError, RuntimeError, ImportError, OSError)) else "other"


_PACK = {cls: attrgetter(*(field.name for field in fields(cls))) for cls in (Request, Outcome)}


def pack(items: Sequence[Request] | Sequence[Outcome]) -> list[tuple[Any, ...]]:
    """As tuples of their fields, which are pickled in a quarter of the time."""
    return list(map(_PACK[type(items[0])], items)) if items else []


def unpack(cls: Any, packed: Iterable[tuple[Any, ...]]) -> list[Any]:
    """What `pack` made tuples of, objects of that class."""
    return list(starmap(cls, packed))


class Channel:
    """Messages between two processes. Neither side ever waits for the other to read: a thread sends and one receives.

    Args:
        deliver: Called with each message, in a thread.
        ended: Called when the other side is gone, in a thread.
    """

    def __init__(self, connection: Connection, deliver: Callable[[Any], None], ended: Callable[[], None]) -> None:
        self._connection = connection
        self._deliver, self._ended = deliver, ended
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sent = threading.Event()
        for work in (self._receive, self._send):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def send(self, message: Any) -> None:
        """Queue a message. It must not be changed any more."""
        self._outgoing.put(message)

    def stop(self) -> None:
        """Send nothing any more, but for what was queued."""
        self._outgoing.put(None)

    def flush(self) -> None:
        """Stop, and wait until all is sent."""
        self.stop()
        self._sent.wait()

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # the other side is gone: _receive finds out, too
            while (message := self._outgoing.get()) is not None:
                self._connection.send(message)
        self._sent.set()

    def _receive(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                self._deliver(self._connection.recv())
        self._ended()


class Trace:
    """Which requests the engine is computing, in memory that outlives its process.

    Args:
        file: Descriptor of a file of Trace.SIZE bytes, open in both processes.
    """

    CAPACITY = 1 << 16
    """Requests; of more it only knows that there were some."""
    SIZE = 8 * (CAPACITY + 2)

    def __init__(self, file: int) -> None:
        self._words = memoryview(mmap.mmap(file, self.SIZE)).cast("q")  # number of notes, number of ids, ids

    def note(self, request_ids: Sequence[int]) -> None:
        """These are computed now, and no others."""
        count = len(request_ids)
        self.step()
        if count <= self.CAPACITY:
            self._words[2 : 2 + count] = memoryview(array("q", request_ids))
            self._words[1] = count

    def step(self) -> None:
        """Something goes on, with any of the requests."""
        self._words[1] = -1
        self._words[0] += 1

    @property
    def num_notes(self) -> int:
        """Grows as long as the process gets on."""
        return self._words[0]

    def read(self) -> set[int] | None:
        """The requests of the last note; None if they are not known."""
        count = self._words[1]
        return None if count < 0 else set(self._words[2 : 2 + count])
