"""What a process does that lives for its parent alone."""

from __future__ import annotations

import ctypes
import signal
import sys


def leave_signals_to_parent() -> None:
    """Terminal and system signals are the parent's business."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """Where the system can: be killed when the parent is, even in the middle of a call that never ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)
