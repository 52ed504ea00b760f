"""When a job ends before its last row: a signal, the time that it may take, errors everywhere."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from types import FrameType
from typing import Any

from runner.config import JobConfig
from runner.errors import Interrupted, RowError, TooManyErrors
from runner.window import Result

MIN_ROWS_FOR_RATE = 100
"""Before this many rows `max_error_rate` says nothing."""
AHEAD = (signal.SIGUSR1, signal.SIGUSR2)
"""What Slurm is asked to send before its time limit: the first by jobs/slurm, the second by the launcher of sweeps."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, *AHEAD)


class Stop:
    """Whether to leave: a signal came, or the time is over. Handles signals while it is entered, in the main thread.

    The first signal asks the loop to leave; if that takes longer than grace_s, or at a second Ctrl-C, the process ends
    on the spot, which costs only what has not reached the journal.
    """

    def __init__(self, job: JobConfig, began: float) -> None:
        self._grace_s = job.grace_s
        self._deadline = None if job.max_runtime_s is None else began + job.max_runtime_s
        self._max_runtime_s = job.max_runtime_s
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._timer is not None:
            self._timer.cancel()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            if number == signal.SIGINT:
                os._exit(Interrupted.exit_code)
            return
        self._received = signal.Signals(number)
        self._timer = threading.Timer(self._grace_s, os._exit, [Interrupted.exit_code])
        self._timer.daemon = True
        self._timer.start()

    def check(self) -> None:
        """Raise Interrupted if it is time to leave."""
        again = "run the same command again to go on"
        if self._received is not None:
            raise Interrupted(f"stopped by {self._received.name}; finished rows are kept; {again}", self._received)
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise Interrupted(f"max_runtime_s: {self._max_runtime_s:g} s are over; rows are left; {again}")


class ErrorLimit:
    """When a job fails everywhere: max_error_rate and max_consecutive_errors.

    Rows that become no request are known long before the rows around them have a result. So the two kinds are counted
    apart: refused rows among those read, failed ones among those that came back from the engine.
    """

    def __init__(self, job: JobConfig) -> None:
        self._rate = job.max_error_rate
        self._consecutive = job.max_consecutive_errors
        self._num_read = self._num_refused = self._refused_in_a_row = 0
        self._num_returned = self._num_failed = self._failed_in_a_row = 0
        self._most_in_a_row = 0
        self._codes: Counter[str] = Counter()
        self._messages: dict[str, str] = {}

    def refused(self, error: RowError) -> None:
        """The next row of the input could not become a request."""
        self._num_read += 1
        self._num_refused += 1
        self._refused_in_a_row += 1
        self._most_in_a_row = max(self._most_in_a_row, self._refused_in_a_row)
        self._note(error)

    def accepted(self) -> None:
        """The next row of the input is for the engine."""
        self._num_read += 1
        self._refused_in_a_row = 0

    def returned(self, result: Result) -> None:
        """A row came back from the engine."""
        self._num_returned += 1
        if isinstance(result, RowError):
            self._num_failed += 1
            self._failed_in_a_row += 1
            self._most_in_a_row = max(self._most_in_a_row, self._failed_in_a_row)
            self._note(result)
        else:
            self._failed_in_a_row = 0

    def check(self) -> None:
        """Raise TooManyErrors if it is enough."""
        if self._consecutive is not None and self._most_in_a_row >= self._consecutive:
            raise TooManyErrors(
                f"max_consecutive_errors: {self._most_in_a_row:,} rows one after the other ended in an error; expected "
                f"fewer than {self._consecutive:,}{self._advice()}"
            )
        for number, total in (
            (self._num_failed, self._num_returned),
            (self._num_refused + self._num_failed, self._num_read),
        ):
            if total >= MIN_ROWS_FOR_RATE and number > self._rate * total:
                raise TooManyErrors(
                    f"max_error_rate: {number:,} of {total:,} rows ended in an error; expected at most "
                    f"{self._rate:.0%}{self._advice()}"
                )

    def _note(self, error: RowError) -> None:
        self._codes[error.code] += 1
        self._messages.setdefault(error.code, error.message)

    def _advice(self) -> str:
        code, count = self._codes.most_common(1)[0]
        return (
            f"; most of them, {count:,}, with {code}: {self._messages[code]}; finished rows are kept: raise the "
            "limit to go on (retry_errors=true does the failed rows again), or correct the task, the model or the "
            "input, which makes it another job (another name)"
        )
