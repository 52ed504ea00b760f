"""A job in a process of its own, to be killed. Forked from one that has the modules, so that it starts at once."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from runner.errors import RunnerError
from runner.job import run
from tests.fake_engine import FakeEngine
from tests.small_job import make_plan


def start(folder: Path, engine: dict[str, Any], **changes: Any) -> BaseProcess:
    """A process that runs the job of `small_job.make_plan`, with a FakeEngine of these arguments."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_main, args=(folder, engine, changes))
    process.start()
    return process


def _main(folder: Path, engine: dict[str, Any], changes: dict[str, Any]) -> None:
    try:
        run(make_plan(folder, **changes), FakeEngine(**engine))
    except RunnerError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
