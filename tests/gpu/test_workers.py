"""Work in processes of its own. No torch here, as each of them imports this file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from tests.gpu import workers


def breaking() -> Callable[[str], str]:
    def work(item: str) -> str:
        if item == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif item == "hangs":
            time.sleep(60)
        elif item == "raises":
            raise ValueError("no good")
        elif item == "loses the device":
            raise workers.DeviceLost("illegal memory access")
        return f"{item} in {os.getpid()}"

    return work


def test_work_that_breaks_its_process_costs_that_work() -> None:
    items = ["a", "raises", "b", "dies", "c", "loses the device", "d", "hangs", "e"]
    found = dict(workers.each(breaking, (), items, 1, 1.0, time.time() + 60))
    assert set(found) == set(items)
    lost = {item: found.pop(item).why for item in ("raises", "dies", "loses the device", "hangs")}
    assert lost == {
        "raises": "ValueError: no good",
        "dies": "its process ended with status -11",
        "loses the device": "illegal memory access",
        "hangs": "no result in 1 s: its process was ended",
    }
    processes = [result.split()[-1] for result in found.values()]
    assert processes[0] == processes[1] and len(set(processes)) == 4


def failing() -> Callable[[str], str]:
    raise ImportError("no library")


def test_work_that_cannot_begin_says_why() -> None:
    found = dict(workers.each(failing, (), ["a", "b"], 2, 1.0, time.time() + 60))
    assert [found[item].why for item in "ab"] == ["its process did not start: ImportError: no library"] * 2
