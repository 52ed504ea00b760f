"""Workers that share a job: a chunk is one worker's at a time, a dead one's goes to others, a late one harms none."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.__main__ import command_line
from runner.config import ShardConfig
from runner.errors import Interrupted
from runner.job import run
from runner.leases import Leases
from runner.ledger import Ledger
from runner.source import open_source
from runner.status import merge, status
from runner.storage import LEASES_FOLDER, Storage
from runner.verify import verify
from tests.bench.sharing import simulate
from tests.fake_engine import FakeEngine
from tests.runner.output.cases import FINGERPRINT
from tests.runner.output.test_large_ledger import part
from tests.runner.output.test_object_storage import bucket, endpoint  # noqa: F401
from tests.small_job import make_plan, read_output, write_rows

SHARED = ShardConfig(sharing="leases", lease_s=8)
NUM_CHUNKS = 12


class Clock:
    """Time that a test lets pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["folder", "bucket"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    if request.param == "folder":
        return Ledger.open(str(tmp_path / "job"), FINGERPRINT)
    return Ledger.open(f"{request.getfixturevalue('bucket')}/job", FINGERPRINT)


@pytest.fixture
def join(ledger: Ledger) -> Iterator[Callable[..., Leases]]:
    """Makes workers of the job; on another machine unless they are named otherwise."""
    made: list[Leases] = []
    chunks = [part(index).chunk for index in range(NUM_CHUNKS)]

    def worker(name: str, clock: Clock | None = None, shard: ShardConfig = SHARED) -> Leases:
        made.append(Leases(ledger, f"{name}-elsewhere-1-1-0", chunks, shard, clock or Clock()))
        return made[-1]

    yield worker
    for leases in made:
        leases._stop.set()


def take_all(leases: Leases) -> list[int]:
    found = []
    while (taken := leases.take()) is not None:
        found.append(taken.chunk.index)
    return found


def stop_beating(leases: Leases) -> None:
    """As if its machine had lost its power."""
    leases._stop.set()
    leases._thread.join()


def enter(ledger: Ledger, index: int) -> None:
    made = part(index)
    ledger.storage.write(made.staged, b"rows")
    assert ledger.commit(made)


def test_every_chunk_is_one_workers(ledger: Ledger, join: Callable[..., Leases]) -> None:
    first, second = join("a"), join("b")
    found = [leases.take() for _ in range(4) for leases in (first, second)]
    assert len({taken.chunk.index for taken in found if taken is not None}) == 8
    rest = take_all(first)
    assert len(rest) == 4 and take_all(second) == [] and not second.finished


def test_own_shard_comes_first(join: Callable[..., Leases]) -> None:
    leases = join("a", shard=ShardConfig(1, 3, "leases", 8))
    assert take_all(leases)[:4] == [1, 4, 7, 10]


def test_what_a_worker_has_left_goes_to_others_at_once(ledger: Ledger, join: Callable[..., Leases]) -> None:
    clock = Clock()
    first, second = join("a"), join("b", clock)
    held = take_all(first)
    for index in held[:2]:
        enter(ledger, index)
        first.committed(index)
    assert second.take() is None
    first.close()
    clock.now += 2
    taken = second.take()
    assert taken is not None and taken.holders == (first._worker,)
    assert sorted([taken.chunk.index, *take_all(second)]) == sorted(held[2:])


def test_a_silent_worker_loses_its_chunks_after_the_time(join: Callable[..., Leases]) -> None:
    clock = Clock()
    first, second, third = join("a"), join("b", clock), join("c", clock)
    held = take_all(first)
    stop_beating(first)
    for now in range(0, 8, 2):
        clock.now = now
        assert second.take() is None and third.take() is None
    clock.now = 8
    both = take_all(second) + take_all(third)
    assert sorted(both) == sorted(held)


def test_a_worker_that_gives_signs_of_life_keeps_its_chunks(join: Callable[..., Leases]) -> None:
    clock = Clock()
    first, second = join("a"), join("b", clock)
    take_all(first)
    for number in range(1, 12):
        first._beat(number)
        clock.now += 3
        assert second.take() is None


def test_a_pause_of_the_observer_says_nothing_about_others(join: Callable[..., Leases]) -> None:
    """Both were on a machine that slept."""
    clock = Clock()
    first, second = join("a"), join("b", clock)
    take_all(first)
    stop_beating(first)
    assert second.take() is None
    clock.now += 1000
    assert second.take() is None


def test_a_worker_that_wakes_up_changes_nothing(ledger: Ledger, join: Callable[..., Leases]) -> None:
    clock = Clock()
    first, second = join("a"), join("b", clock)
    index = take_all(first)[0]
    stop_beating(first)
    for clock.now in range(0, 10, 2):
        taken = second.take()
    while taken is not None and taken.chunk.index != index:
        taken = second.take()
    enter(ledger, index)
    second.committed(index)
    late = part(index)
    late = type(late)(**{name: getattr(late, name) for name in late.__slots__} | {"staged": "staging/late.parquet"})
    ledger.storage.write(late.staged, b"others")
    assert not ledger.commit(late)
    first.committed(index)
    assert ledger.storage.read(late.path) == b"rows" and ledger.storage.read(late.staged) is None
    assert not [name for name in ledger.storage.list(LEASES_FOLDER) if name.startswith(f"{index:08d}")]


def test_a_committed_chunk_is_not_taken_again(ledger: Ledger, join: Callable[..., Leases]) -> None:
    """Committed, and its lease removed, between another worker's look and its try."""
    clock = Clock()
    first, second = join("a", clock), join("b")
    taken = second.take()
    assert taken is not None
    for index in {*range(NUM_CHUNKS)} - {taken.chunk.index}:
        enter(ledger, index)
    assert second.take() is None
    enter(ledger, taken.chunk.index)
    second.committed(taken.chunk.index)
    assert first.take() is None
    clock.now += 2
    assert first.take() is None and first.finished


def test_what_an_earlier_run_has_seen_is_not_believed(ledger: Ledger, join: Callable[..., Leases]) -> None:
    """A person removed the entries, to have the chunks done again."""
    ledger.storage.replace("leases/seen", b"\xff\xf0")
    assert len(take_all(join("a"))) == NUM_CHUNKS


def test_a_dead_process_of_this_machine_is_known_at_once(tmp_path: Path) -> None:
    from runner import journal

    dead = subprocess.Popen(["true"])
    dead.wait()
    name = journal._process_name().rpartition("-")[0] + f"-{dead.pid}-0"
    ledger = Ledger.open(str(tmp_path / "job"), FINGERPRINT)
    chunks = [part(index).chunk for index in range(3)]
    first, second = (Leases(ledger, worker, chunks, SHARED) for worker in (f"a-{name}", "b-elsewhere-1-1-0"))
    assert len(take_all(first)) == len(take_all(second)) == 3
    for leases in (first, second):
        leases._stop.set()


def test_four_workers_make_one_output(tmp_path: Path) -> None:
    texts = [None if i % 40 == 7 else f"row {i}" for i in range(2000)]
    write_rows(tmp_path / "rows", texts[:900], texts[900:])
    whole = run(make_plan(tmp_path, name="whole"), FakeEngine())
    engines = [FakeEngine(per_step=20, step_s=0.001) for _ in range(4)]
    plans = [make_plan(tmp_path, shard=ShardConfig(sharing="leases", lease_s=4)) for _ in engines]
    summaries: list[Any] = []
    threads = [
        threading.Thread(target=lambda plan=plan, engine=engine: summaries.append(run(plan, engine)))
        for plan, engine in zip(plans, engines, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [summary.finished for summary in summaries] == [True] * 4
    assert read_output(summaries[0].folder).equals(read_output(whole.folder))
    requests = [engine.num_requests for engine in engines]
    assert sum(requests) == 1950 and min(requests) > 0
    assert not any((Path(summaries[0].folder) / "leases").iterdir())


def test_many_workers_commit_each_chunk_once(tmp_path: Path) -> None:
    """The bookkeeping alone, as `python -m tests.bench sharing` measures it: a second commit of a chunk would fail."""
    figures = simulate(str(tmp_path / "job"), 40, 6)
    assert figures["chunks"] == 40 and figures["most_chunks_of_one_worker"] < 30


def test_the_rows_of_a_worker_that_left_are_not_computed_again(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", [f"row {i}" for i in range(400)])
    shard = ShardConfig(sharing="leases", lease_s=4)
    engine, steps = FakeEngine(per_step=10), iter(range(100))
    engine.on_step = lambda: os.kill(os.getpid(), signal.SIGTERM) if next(steps) == 12 else None
    with pytest.raises(Interrupted):
        run(make_plan(tmp_path, shard=shard), engine)
    state = status(str(tmp_path / "out" / "job"), make_plan(tmp_path, shard=shard).job)
    assert state.num_leased > 0 and state.exit_code == 75
    resumed = FakeEngine()
    summary = run(make_plan(tmp_path, shard=shard), resumed)
    assert summary.finished and read_output(summary.folder).column("id").to_pylist() == list(range(400))
    assert resumed.num_requests == 400 - 130


def test_status_and_merge_of_an_array(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", [f"row {i}" for i in range(950)])
    shards = [ShardConfig(index, 3) for index in range(3)]
    for shard in shards[:2]:
        run(make_plan(tmp_path, shard=shard), FakeEngine())
    plan = make_plan(tmp_path, shard=shards[0])
    half = status(plan.output_folder, plan.job)
    assert (half.num_done, half.num_chunks, half.exit_code) == (7, 10, 75)
    assert half.shards == {0: (4, 4), 1: (3, 3), 2: (0, 3)}
    assert "shards    2 of 3 done\n          shard 2: 0 of 3 chunks" in half.text()
    with pytest.raises(Interrupted, match=r"3 of 10 chunks are not done; expected all"):
        merge(plan.output_folder, plan.job)
    run(make_plan(tmp_path, shard=shards[2]), FakeEngine())
    folder = Path(plan.output_folder)
    for name in ("_SUCCESS", "manifest.jsonl"):  # as if the last two shards had ended at the same instant
        (folder / name).unlink()
    unmarked = status(plan.output_folder, plan.job)
    assert unmarked.exit_code == 75 and "run mode=merge" in unmarked.text()
    assert merge(plan.output_folder, plan.job).num_rows == 950
    assert status(plan.output_folder, plan.job).exit_code == 0
    lines = (folder / "manifest.jsonl").read_bytes().splitlines()
    assert len(lines) == 10 and b'"path":"parts/part-00000009.parquet","num_rows":50' in lines[-1]
    assert verify(plan.output_folder, open_source(plan.job.dataset)).exit_code == 0


def test_status_and_merge_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "rows", [f"row {i}" for i in range(250)])
    given = [f"output.folder={tmp_path}/out", f"dataset.path={tmp_path}/rows", "dataset.chunk_rows=100", "name=job"]
    assert command_line(["mode=status", *given]) == 4
    assert "no fingerprint.json; expected the output folder of a job" in capsys.readouterr().err
    run(make_plan(tmp_path, shard=ShardConfig(0, 2)), FakeEngine())
    assert command_line(["mode=merge", "shard.count=2", *given]) == 75
    assert "1 of 3 chunks are not done" in capsys.readouterr().err
    run(make_plan(tmp_path, shard=ShardConfig(1, 2)), FakeEngine())
    assert command_line(["mode=status", "shard.count=2", *given]) == 0
    shown = capsys.readouterr().out
    assert "3 of 3 done, 100%" in shown and "250 committed" in shown and shown.endswith("finished\n")
    assert command_line(["mode=merge", *given]) == 0


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS says it: the file that was opened is gone."""
    storage = Ledger.open(str(tmp_path / "job"), FINGERPRINT).storage
    storage.replace("leases/a.worker", b"1")
    whole, stale = Path.read_bytes, iter([True, True])

    def read_bytes(path: Path) -> bytes:
        if next(stale, False):
            raise OSError(errno.ESTALE, "Stale file handle")
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert storage.read("leases/a.worker") == b"1" and storage.read("leases/b.worker") is None


def test_a_cleared_temporary_folder_is_no_error(tmp_path: Path) -> None:
    """Whoever finishes a job clears it, while others write their signs of life."""
    storage: Storage = Ledger.open(str(tmp_path / "job"), FINGERPRINT).storage
    stop = threading.Event()

    def clear() -> None:
        while not stop.wait(0.02):
            for name in storage.list("staging"):
                storage.remove(f"staging/{name}")

    thread = threading.Thread(target=clear)
    thread.start()
    try:
        for number in range(60):
            storage.replace("leases/a.worker", str(number).encode())
            assert storage.create(f"leases/{number:08d}.0", b"a")
    finally:
        stop.set()
        thread.join()
    assert storage.read("leases/a.worker") == b"59" and len(storage.list("leases")) == 61
