"""What jobs/slurm/*.sbatch start in these tests in place of the runner's command: the runner's loop, journal, ledger
and signals with an engine that answers at once, so that a job is at work a second after it was started.

Its folder is STAND_IN_FOLDER, what a step of five rows takes STAND_IN_STEP_S; it takes overrides of `shard` only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from runner.config import ShardConfig
from runner.errors import RunnerError
from runner.job import run
from tests.fake_engine import FakeEngine
from tests.small_job import make_plan

JOB: dict[str, Any] = {
    "window_rows": 40,
    "dataset": {"chunk_rows": 60},
    "output": {"journal_interval_s": 0.1},
}


def main() -> int:
    given = dict(word.removeprefix("shard.").split("=") for word in sys.argv[1:])
    shard = ShardConfig(int(given.get("index", 0)), int(given.get("count", 1)), given.get("sharing", "fixed"), 10)
    folder = Path(os.environ["STAND_IN_FOLDER"])
    try:
        run(make_plan(folder, shard=shard, **JOB), FakeEngine(5, float(os.environ["STAND_IN_STEP_S"])))
    except RunnerError as error:
        print(error, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
