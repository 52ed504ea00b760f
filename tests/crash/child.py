"""A job in a process of its own, to be killed. Forked from one that has the modules, so that it starts at once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from runner.errors import RunnerError
from runner.job import run
from runner.storage import FAULTS
from tests.fake_engine import FakeEngine
from tests.small_job import make_plan


def start(folder: Path, engine: dict[str, Any], faults: str = "", **changes: Any) -> BaseProcess:
    """A process that runs the job of `small_job.make_plan`, with a FakeEngine of these arguments.

    faults: RUNNER_FAULTS of that process, as in runner/faults.py.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_main, args=(folder, engine, faults, changes))
    process.start()
    return process


def _main(folder: Path, engine: dict[str, Any], faults: str, changes: dict[str, Any]) -> None:
    if faults:
        os.environ[FAULTS] = faults
    try:
        run(make_plan(folder, **changes), FakeEngine(**engine))
    except RunnerError as error:
        (folder / "message").write_text(str(error))
        sys.exit(error.exit_code)
