"""Every step that a job takes on its output folder fails in every way; the next run makes it whole."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from runner.errors import OutputError
from runner.faults import SIGNALS, parse
from runner.job import run
from tests.crash.child import start
from tests.crash.test_kill import JOB, SLOW, check, check_visible, identities_of
from tests.fake_engine import FakeEngine
from tests.small_job import make_plan, read_output, write_rows

POINTS = (
    "fingerprint.link",  # the folder becomes this job's
    "part.open",  # the temporary file of a part
    "part.write",
    "part.fsync",
    "part.rename",
    "part.sync_folder",
    "journal.open",
    "journal.write",
    "journal.fsync",
    "entry.link",  # the commit
    "entry.sync_folder",
    "temporary.write",
    "mark.rename",  # the success mark
)
ENDS = {"kill": -signal.SIGKILL, "kill-after": -signal.SIGKILL, "torn": -signal.SIGKILL, "short": 0}
ENDS |= {"term": 75, "usr1": 75} | dict.fromkeys(("ENOSPC", "EIO", "EACCES"), 4)
ONLY_WRITES = ("short", "torn")
CASES = [
    (point, effect) for point in POINTS for effect in ENDS if effect not in ONLY_WRITES or point.endswith(".write")
]


def test_points_and_effects_are_checked() -> None:
    assert parse("part.rename=kill@3").turn == 3
    for text in ("part.rename", "part.fly=kill", "nothing.open=kill", "part.open=EXPLODE", "part.open=kill@x"):
        with pytest.raises(OutputError, match="RUNNER_FAULTS"):
            parse(text)


@pytest.mark.parametrize("turn", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("point", "effect"), CASES, ids=[f"{point}={effect}" for point, effect in CASES])
def test_every_step_fails_in_every_way(tmp_path: Path, point: str, effect: str, turn: int) -> None:
    write_rows(tmp_path / "rows", [None if i % 40 == 7 else f"row {i}" for i in range(300)])
    undisturbed = read_output(run(make_plan(tmp_path, **JOB, name="undisturbed"), FakeEngine()).folder)
    process = start(tmp_path, SLOW, f"{point}={effect}@{turn}", **JOB)
    process.join(120)
    once = turn > 1 and (point.split(".")[0] in ("fingerprint", "mark") or point == "journal.open")
    # A signal that comes as the last chunk is committed finds nothing left to stop.
    allowed = {ENDS[effect]} | ({0} if once or effect in SIGNALS else set())
    if point in ("fingerprint.link", "temporary.write") and effect in SIGNALS:
        allowed.add(-SIGNALS[effect])  # as the folder is claimed: nothing has begun that could be ended in order
    assert process.exitcode in allowed
    if process.exitcode == 4:
        message = (tmp_path / "message").read_text()
        assert "expected a folder that can be written and has room" in message or "cannot make hard links" in message
    check_visible(tmp_path / "out" / "job" / "parts", identities_of(undisturbed, tmp_path), hash(point) % 3)
    assert run(make_plan(tmp_path, **JOB), FakeEngine()).finished
    check(tmp_path, undisturbed)
