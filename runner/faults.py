"""Storage that fails where a test asks it to, in a process that was started with RUNNER_FAULTS in its environment.

    RUNNER_FAULTS="part.rename=kill@3"

is a point, an effect, and at which occurrence of the point (1 if left out). A point is what is touched and how:
{part, entry, journal, mark, fingerprint, temporary, other}.{open, write, fsync, link, rename, unlink, sync_folder}.
Effects: kill and kill-after end the process with no clean-up, before and after the step; term and usr1 send it that
signal and go on; ENOSPC, EIO, EACCES ... are raised in place of the step; short writes less than was asked for, torn
writes half and then kills. Nothing else in the runner knows of this.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from runner.errors import OutputError
from runner.storage import JOURNAL_FOLDER, PARTS_FOLDER, TEMPORARY_FOLDER, LocalStorage

T = TypeVar("T")
THINGS = ("part", "entry", "journal", "mark", "fingerprint", "temporary", "other")
STEPS = ("open", "write", "fsync", "link", "rename", "unlink", "sync_folder")
SIGNALS = {"term": signal.SIGTERM, "usr1": signal.SIGUSR1}
EFFECTS = ("kill", "kill-after", "short", "torn", *SIGNALS)


@dataclass
class Fault:
    point: str
    effect: str
    turn: int
    """Which occurrence of the point, from 1; counts down."""


class FaultyStorage(LocalStorage):
    """A folder whose every step may be the one that fails."""

    def __init__(self, root: str, fault: str) -> None:
        super().__init__(root)
        self._fault = parse(fault)
        self._paths: dict[int, Path] = {}

    def _open(self, path: Path, flags: int) -> int:
        fd = self._with(self._due("open", path), lambda: LocalStorage._open(self, path, flags))
        self._paths[fd] = path
        return fd

    def _write(self, fd: int, data: memoryview) -> int:
        whole = LocalStorage._write
        effect = self._due("write", self._paths[fd])
        if effect == "short":
            return whole(self, fd, data[: max(1, len(data) // 2)])
        if effect == "torn":
            whole(self, fd, data[: len(data) // 2])
            _end()
        return self._with(effect, lambda: whole(self, fd, data))

    def _fsync(self, fd: int) -> None:
        self._step("fsync", self._paths[fd], lambda: LocalStorage._fsync(self, fd))

    def _sync_folder(self, folder: Path) -> None:
        self._step("sync_folder", folder / "-", lambda: LocalStorage._sync_folder(self, folder))

    def _link(self, source: Path, target: Path) -> None:
        self._step("link", target, lambda: LocalStorage._link(self, source, target))

    def _rename(self, source: Path, target: Path) -> None:
        self._step("rename", target, lambda: LocalStorage._rename(self, source, target))

    def _unlink(self, path: Path) -> None:
        self._step("unlink", path, lambda: LocalStorage._unlink(self, path))

    def _step(self, step: str, path: Path, do: Callable[[], None]) -> None:
        self._with(self._due(step, path), do)

    def _due(self, step: str, path: Path) -> str | None:
        """The effect, if this is its turn."""
        if self._fault.point != f"{self._thing(path)}.{step}":
            return None
        self._fault.turn -= 1
        return self._fault.effect if self._fault.turn == 0 else None

    def _with(self, effect: str | None, do: Callable[[], T]) -> T:
        if effect == "kill":
            _end()
        if effect in SIGNALS:
            os.kill(os.getpid(), SIGNALS[effect])
        elif effect is not None and effect not in EFFECTS:
            code = getattr(errno, effect)
            raise OSError(code, os.strerror(code))
        result = do()
        if effect == "kill-after":
            _end()
        return result

    def _thing(self, path: Path) -> str:
        if not path.is_relative_to(self.root):
            return "other"  # a folder above, as it is made
        relative = path.relative_to(self.root)
        folder = relative.parts[0] if len(relative.parts) > 1 else ""
        if folder == TEMPORARY_FOLDER:
            return "part" if path.name.startswith("part-") else "temporary"
        named = {PARTS_FOLDER: "part", "ledger": "entry", JOURNAL_FOLDER: "journal"}
        if folder in named:
            return named[folder]
        return {"_SUCCESS": "mark", "fingerprint.json": "fingerprint"}.get(path.name, "other")


def parse(text: str) -> Fault:
    """Raises OutputError if the text names no point or effect."""
    point, _, rest = text.partition("=")
    effect, _, turn = rest.partition("@")
    thing, _, step = point.partition(".")
    known = effect in EFFECTS or (effect.startswith("E") and hasattr(errno, effect))
    if thing not in THINGS or step not in STEPS or not known or not (turn or "1").isdigit():
        raise OutputError(
            f"RUNNER_FAULTS: {text!r}; expected <thing>.<step>=<effect>@<turn> as in runner/faults.py; "
            "unset it, it is for tests"
        )
    return Fault(point, effect, int(turn or 1))


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
