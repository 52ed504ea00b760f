"""Errors by who must act, with the exit code that each one ends the process with.

Every message has one form: `<key or row>: <what was found>; <what is expected>; <what to do>`.
"""

from __future__ import annotations


class RunnerError(Exception):
    """Base of the errors that end a job with a message instead of a stack trace."""

    exit_code = 70


class ConfigError(RunnerError):
    """The person who wrote the configuration must act: a wrong key, type, value or combination."""

    exit_code = 2


class InputError(RunnerError):
    """What the configuration points at is missing, unreadable or has changed: data, model files."""

    exit_code = 3


class OutputError(RunnerError):
    """The output folder cannot be used: another job's, not writable, damaged."""

    exit_code = 4


class EngineError(RunnerError):
    """No engine can run this model here, or the engine failed for all rows."""

    exit_code = 5


class TooManyErrors(RunnerError):
    """`max_error_rate` or `max_consecutive_errors` was exceeded; committed rows are kept."""

    exit_code = 6


class InternalError(RunnerError):
    """A defect of this project."""

    exit_code = 70


class Interrupted(RunnerError):
    """Stopped by a signal or by `max_runtime_s` with rows left: run the same command again (EX_TEMPFAIL)."""

    exit_code = 75

    def __init__(self, message: str, signal: int | None = None) -> None:
        super().__init__(message)
        self.signal = signal
        """Its number. A sweep ends with the job that a signal stopped; after `max_runtime_s` its next job begins."""


# Codes of the rows that no request is made of.
NULL_INPUT = "null_input"
"""A template prints a column that is null in this row."""
EMPTY_INPUT = "empty_input"
"""Nothing is left for the model to read: no tokens."""
TEMPLATE_ERROR = "template_error"
"""A template fails on this row."""
TOO_LONG = "too_long"
"""More tokens than the model takes, or more text than any model could."""
BAD_SAMPLING = "bad_sampling"
"""A sampling parameter from a column has a wrong type or is out of its bounds."""
BAD_MESSAGES = "bad_messages"
"""A conversation that is none, or that the model's chat template refuses."""
UNREADABLE_ROW = "unreadable_row"
"""The input file has no sound row here."""


class RowError(Exception):
    """One row cannot be processed. Becomes the row's `error_code` and `error_message`, never ends a job."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
