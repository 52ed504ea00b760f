"""One engine process as its parent holds it: the start, messages both ways, what it prints, its end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Any

from engines.api import EngineSettings, Request
from runner.engine_main import STACKS_SIGNAL, Channel, Loader, Release, Trace, pack

STACKS_S = 1.0
"""What writing its stacks may take a process that hangs."""
WAIT_S = 5.0
"""What the system may take to end a process that was killed."""
MAX_LINES = 1000
"""Lines of its output that are taken while a process lives."""
MAX_LINE_BYTES = 1000
LAST_LINES = 200
"""Lines that are taken at its end, where the stacks are."""
MAX_FILE_BYTES = 1 << 20
_BOOTSTRAP = (
    "import sys; from multiprocessing.connection import Connection; connection = Connection(int(sys.argv[1])); "
    "sys.path[:] = connection.recv(); from runner.engine_main import serve; serve(connection, int(sys.argv[2]))"
)


@dataclass(frozen=True, slots=True)
class Ended:
    """The last that is delivered: the process has gone."""


class EngineProcess:
    """A process that runs `runner.engine_main.serve`.

    Started as a fresh interpreter, not forked: a fork has the parent's threads' locks and no threads. It belongs to the
    thread that made it, with which it ends.

    Args:
        deliver: Called, in another thread, with each message of the process and at last with Ended.
    """

    def __init__(self, loader: Loader, settings: EngineSettings, deliver: Callable[[Any], None]) -> None:
        self.ready = False
        """Whether the engine is loaded; set by who takes the messages."""
        self.has_answered = False
        """Whether an outcome has come; set likewise."""
        self.num_sent = 0
        """Requests."""
        self.allowed = self._looked = time.monotonic()
        """When it was allowed to load."""
        self._trace_file, self._log = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._trace_file.truncate(Trace.SIZE)
        self.trace = Trace(self._trace_file.fileno())
        fcntl.fcntl(self._log, fcntl.F_SETFL, os.O_APPEND)
        self._position = self._num_lines = self._num_notes = 0
        self._silent_s = 0.0
        connection, theirs = Pipe()
        files = (theirs.fileno(), self._trace_file.fileno())
        # In a session of its own: Ctrl-C in the terminal is for the parent, who wants the finished rows first.
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _BOOTSTRAP, *map(str, files)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=os.environ | settings.environment,
            pass_fds=files,
            start_new_session=True,
        )
        theirs.close()
        self._channel = Channel(connection, deliver, lambda: deliver(Ended()))
        self.send(sys.path)
        self.send((loader, settings))

    def send(self, message: Any) -> None:
        """Queue a message; in the order that engine_main says."""
        self._channel.send(message)

    def allow_loading(self) -> None:
        """What the loader waits for."""
        self.allowed = time.monotonic()
        self.send(True)

    def send_requests(self, requests: Sequence[Request]) -> None:
        """For an engine that is loaded."""
        self.num_sent += len(requests)
        self.send(pack(requests))

    def release(self, request_ids: Sequence[int]) -> None:
        """For an engine that hands over."""
        self.send(Release(list(request_ids)))

    def silent_s(self, busy: bool) -> float:
        """How long it has not got on, as far as calls of this a few times a second can tell. busy: it has requests."""
        now = time.monotonic()
        # A look counts for a second at most: when both processes were stopped for an hour, nothing hangs.
        elapsed, self._looked = min(now - self._looked, 1.0), now
        moved = self.trace.num_notes != self._num_notes
        self._num_notes = self.trace.num_notes
        self._silent_s = self._silent_s + elapsed if busy and not moved else 0.0
        return self._silent_s

    def write_stacks(self) -> None:
        """Have it print where its threads are, and give it a moment for that."""
        size = self._log_bytes()
        self._process.send_signal(STACKS_SIGNAL)
        end = time.monotonic() + STACKS_S
        while time.monotonic() < end and self._log_bytes() == size:
            time.sleep(0.02)
        time.sleep(0.05)

    def end(self, patience_s: float = 0.0) -> int:
        """End it, if it has not ended by itself in patience_s; its exit status as subprocess gives it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        self._process.kill()
        self._channel.stop()
        return self._process.wait(WAIT_S)

    def close(self) -> None:
        """End it and free what it was held by."""
        self.end()
        self._log.close()
        self._trace_file.close()

    def output(self, last: bool = False) -> list[str]:
        """Lines that it printed since the last call. last: those at the end, if there are many."""
        if last:
            self._position = max(self._position, self._log_bytes() - LAST_LINES * MAX_LINE_BYTES)
        data = os.pread(self._log.fileno(), MAX_FILE_BYTES, self._position)
        complete = data if last or len(data) == MAX_FILE_BYTES else data[: data.rfind(b"\n") + 1]
        self._position += len(complete)
        if self._position >= MAX_FILE_BYTES:
            self._log.truncate(0)
            self._position = 0
        lines = [line[:MAX_LINE_BYTES].decode(errors="replace") for line in complete.splitlines()]
        if last:
            return lines[-LAST_LINES:]
        lines = lines[: max(MAX_LINES - self._num_lines, 0)]
        self._num_lines += len(lines)
        return lines

    def _log_bytes(self) -> int:
        return os.fstat(self._log.fileno()).st_size
