"""A job in a process of its own, to be killed. Forked from one that has the modules, so that it starts at once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from runner.engine_main import Loader
from runner.errors import RunnerError
from runner.job import run
from runner.storage import FAULTS
from tests.fake_engine import FakeEngine
from tests.small_job import make_plan


def start(
    folder: Path,
    engine: dict[str, Any],
    faults: str = "",
    loader: Loader | None = None,
    environment: dict[str, str] | None = None,
    **changes: Any,
) -> BaseProcess:
    """A process that runs the job of `small_job.make_plan`, with a FakeEngine of these arguments or a loader's engine.

    faults: RUNNER_FAULTS of that process, as in runner/faults.py.
    """
    environment = {**(environment or {}), **({FAULTS: faults} if faults else {})}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_main, args=(folder, engine, loader, environment, changes))
    process.start()
    return process


def _main(
    folder: Path, engine: dict[str, Any], loader: Loader | None, environment: dict[str, str], changes: dict[str, Any]
) -> None:
    os.environ.update(environment)
    try:
        plan = make_plan(folder, **changes)
        if loader is None:
            run(plan, FakeEngine(**engine))
        else:
            run(plan, loader=loader)
    except RunnerError as error:
        (folder / "message").write_text(str(error))
        sys.exit(error.exit_code)
