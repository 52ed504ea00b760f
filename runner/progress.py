"""What a person sees of a running job, and what it leaves behind: run.log and metrics.jsonl in the job's folder."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from engines.api import EngineStats
from runner.secrets import mask
from runner.storage import explained

LOG_FILE = "run.log"
METRICS_FILE = "metrics.jsonl"
LINE_INTERVAL_S = 10.0
"""Between two lines of the log, and of the metrics."""
BAR_INTERVAL_S = 0.25


@dataclass(slots=True)
class Counts:
    """What this run has done so far."""

    num_rows: int = 0
    """Rows with a result."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Rows by error code."""

    @property
    def num_errors(self) -> int:
        return self.errors.total()


@dataclass(frozen=True)
class Summary:
    """What a run of a job came to."""

    folder: str
    finished: bool
    """Whether all rows of the job are committed. Not so while other shards are at work."""
    num_rows: int
    """Of the whole job, committed by whichever run."""
    num_errors: int
    """Of these rows."""
    time_s: float
    """Of this run, as are the counts."""
    counts: Counts = field(default_factory=Counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        counts = self.counts
        return {
            "num_rows": self.num_rows,
            "num_errors": self.num_errors,
            "last_run": {
                "time_s": round(self.time_s, 3),
                "num_rows": counts.num_rows,
                "errors": dict(counts.errors),
                "num_prompt_tokens": counts.num_prompt_tokens,
                "num_cached_tokens": counts.num_cached_tokens,
                "num_output_tokens": counts.num_output_tokens,
            },
        }

    def text(self) -> str:
        """For a person, as lines of plain text."""
        counts, seconds = self.counts, max(self.time_s, 1e-9)
        rate = f"{counts.num_rows / seconds:,.0f} rows/s"
        lines = [
            f"rows      {self.num_rows:,} committed{'' if self.finished else '; chunks of others are open'}",
            f"this run  {counts.num_rows:,} rows in {duration(self.time_s)}, {rate}",
            f"tokens    {counts.num_prompt_tokens:,} in ({counts.num_cached_tokens:,} of them reused), "
            f"{counts.num_output_tokens:,} out",
            f"errors    {self.num_errors:,} rows"
            + "".join(f"\n          {count:,} {code} in this run" for code, count in counts.errors.most_common()),
            f"folder    {self.folder}",
        ]
        return "\n".join(lines)


class Progress:
    """Shows how a run goes: a bar on a terminal, else a line now and then; the lines are in the log in any case.

    Args:
        folder: The job's output folder, or where its URL has no place for what grows.
        label: Stands before each line where several processes share the log; may be empty.
        total_rows: Rows that this run will read, before any filter; None if that is not known.
    """

    def __init__(self, folder: Path, label: str = "", total_rows: int | None = None) -> None:
        self.total_rows = total_rows
        self._label = f"{label}: " if label else ""
        self._began = self._last_line = self._last_bar = time.monotonic()
        self._last = Counts()
        self._log = _Lines(folder / LOG_FILE)
        self._metrics = _Lines(folder / METRICS_FILE)
        self._bar: Any = None

    def start(self) -> None:
        """Rates are counted from here."""
        self._began = self._last_line = time.monotonic()
        if sys.stderr is not None and sys.stderr.isatty():  # None: it was closed by whoever started this
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
            self._bar.add_task("starting", total=self.total_rows)
            self._bar.start()

    def say(self, text: str) -> None:
        """A line for the person and for the log."""
        self.note(text)
        if self._bar is None:
            print(mask(f"{self._label}{text}"), file=sys.stderr, flush=True)
        else:
            self._bar.console.print(mask(text), markup=False, highlight=False)

    def note(self, text: str) -> None:
        """A line for the log alone."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self._log.append(f"{now} {self._label}{mask(text)}\n".encode())

    def update(self, counts: Counts, num_read: int, stats: EngineStats | None) -> None:
        """Show how far the run is; may be called at any rate.

        Args:
            num_read: Input rows, before any filter, that are behind this run: what total_rows counts.
        """
        now = time.monotonic()
        if self._bar is not None and now - self._last_bar >= BAR_INTERVAL_S:
            self._last_bar = now
            text = self._line(counts, num_read, stats, now)
            self._bar.update(self._bar.task_ids[0], completed=num_read, description=text, refresh=True)
        if now - self._last_line >= LINE_INTERVAL_S:
            self._write_line(counts, num_read, stats, now)

    def stop(self, counts: Counts, num_read: int, stats: EngineStats | None) -> None:
        """Take the bar away and write the last metrics; lines can still be said."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._write_metrics(counts, num_read, stats, time.monotonic())

    def close(self) -> None:
        self._log.close()
        self._metrics.close()

    def _write_line(self, counts: Counts, num_read: int, stats: EngineStats | None, now: float) -> None:
        line = self._line(counts, num_read, stats, now)
        if self._bar is None:
            self.say(line)
        else:
            self.note(line)
        self._write_metrics(counts, num_read, stats, now)

    def _line(self, counts: Counts, num_read: int, stats: EngineStats | None, now: float) -> str:
        seconds = max(now - self._began, 1e-9)
        parts = [f"{counts.num_rows:,} rows"]  # what matters most comes first: a narrow terminal cuts the end
        if self.total_rows and num_read:
            left = max(self.total_rows - num_read, 0) * seconds / num_read
            parts.append(f"{min(num_read / self.total_rows, 1):.0%}, about {duration(left)} left")
        parts += [
            f"{counts.num_errors:,} errors",
            f"{counts.num_rows / seconds:,.1f} rows/s",
            f"tokens/s {counts.num_prompt_tokens / seconds:,.0f} in {counts.num_output_tokens / seconds:,.0f} out",
        ]
        if stats is not None and stats.num_blocks:
            parts.append(f"KV {_used(stats):.0%}")
        return ", ".join(parts)

    def _write_metrics(self, counts: Counts, num_read: int, stats: EngineStats | None, now: float) -> None:
        seconds, last = max(now - self._last_line, 1e-9), self._last
        record: dict[str, Any] = {
            "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
            "worker": self._label.rstrip(": ") or None,
            "elapsed_s": round(now - self._began, 3),
            "num_rows": counts.num_rows,
            "num_read": num_read,
            "num_errors": counts.num_errors,
            "rows_per_s": round((counts.num_rows - last.num_rows) / seconds, 3),
            "prompt_tokens_per_s": round((counts.num_prompt_tokens - last.num_prompt_tokens) / seconds, 3),
            "output_tokens_per_s": round((counts.num_output_tokens - last.num_output_tokens) / seconds, 3),
        }
        if stats is not None:
            record |= {
                "kv_used_fraction": round(_used(stats), 4),
                "num_running": stats.num_running,
                "num_waiting": stats.num_waiting,
                "num_steps": stats.num_steps,
                "num_preemptions": stats.num_preemptions,
            }
        self._metrics.append(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
        self._last_line = now
        self._last = Counts(counts.num_rows, counts.num_prompt_tokens, 0, counts.num_output_tokens)


def duration(seconds: float) -> str:
    """As "0.25 s", "42 s", "3 min 20 s", "5 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def _used(stats: EngineStats) -> float:
    return 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0


class _Lines:
    """A file that several processes append to. Raises OutputError where the disk does not let them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def append(self, line: bytes) -> None:
        """One write, so that the lines of several processes do not mix."""
        with explained(self._path):
            os.write(self._file, line)

    def close(self) -> None:
        os.close(self._file)
