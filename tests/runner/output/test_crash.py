"""A job is ended at every step that its storage makes; what is left behind is checked, then gone on with."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import polars
import pytest

from runner.chunk import ROW_COLUMN
from runner.config import OutputConfig
from runner.errors import OutputError
from runner.journal import Journal
from runner.ledger import Ledger
from runner.sink import Sink
from runner.storage import LocalStorage
from runner.verify import verify
from tests.runner.output.cases import CHUNK_ROWS, FINGERPRINT, SCHEMA, Crash, FailingStorage, chunk, names, table

NUM_CHUNKS = 2


def run_job(storage: LocalStorage, synced: set[int]) -> int:
    """A small job, resumed if there is one; rows that it has taken from the journal. `synced`: rows it may not lose."""
    ledger = Ledger.open(storage, FINGERPRINT)
    sink = Sink(storage, SCHEMA, OutputConfig(), {"plan": "{}"})
    journal = Journal.open(storage, SCHEMA, "worker")
    done = ledger.done()
    recovered = journal.recover(done)
    num_recovered = sum(rows.num_rows for rows in recovered.values())
    kept = {row for rows in recovered.values() for row in rows.column(ROW_COLUMN).to_pylist()}
    kept |= {row for index in done for row in range(index * CHUNK_ROWS, (index + 1) * CHUNK_ROWS)}
    assert synced <= kept
    for index in range(NUM_CHUNKS):
        ledger.check(chunk(index))
        if index in done:
            continue
        whole = table(index)
        for begin in (0, 5):
            journal.append(index, whole.slice(begin, 5), "id")
            journal.sync()
            synced.update(whole.slice(begin, 5).column(ROW_COLUMN).to_pylist())
        ledger.commit(sink.write(chunk(index), whole, 1))
        journal.drop(index)
    journal.close()
    assert ledger.finish(NUM_CHUNKS, {"rows": NUM_CHUNKS * CHUNK_ROWS})
    return num_recovered


def check_visible(folder: Path) -> None:
    """What a reader sees is committed: each file has its entry, and each row is there at most once."""
    parts = sorted((folder / "parts").glob("*")) if (folder / "parts").exists() else []
    for part in parts:
        assert part.name.startswith("part-") and part.suffix == ".parquet"
        assert (folder / "ledger" / f"{int(part.stem.removeprefix('part-')):08d}.json").exists()
    if parts:
        rows = polars.read_parquet(folder / "parts")[ROW_COLUMN].to_list()
        assert len(rows) == len(set(rows)) == len(parts) * CHUNK_ROWS


def count_steps(folder: Path) -> int:
    storage = FailingStorage(str(folder))
    run_job(storage, set())
    return storage.num_steps


@pytest.mark.parametrize("when", ["before", "after", "torn"])
def test_crash_at_every_step(tmp_path: Path, when: str) -> None:
    num_steps = count_steps(tmp_path / "undisturbed")
    assert num_steps > 40
    expected = {part.name: part.read_bytes() for part in (tmp_path / "undisturbed/parts").iterdir()}
    for step in range(num_steps):
        folder = tmp_path / f"job-{step}"
        synced: set[int] = set()
        with pytest.raises(Crash):
            run_job(FailingStorage(str(folder), step, when), synced)
        check_visible(folder)
        run_job(LocalStorage(str(folder)), synced)
        assert {part.name: part.read_bytes() for part in (folder / "parts").iterdir()} == expected
        report = verify(str(folder), None)
        assert (report.exit_code, report.num_rows) == (0, NUM_CHUNKS * CHUNK_ROWS), report.text()
        assert names(folder / "staging") == names(folder / "journal") == []


def test_crash_of_the_recovery(tmp_path: Path) -> None:
    """Two crashes: one anywhere in the job, one in the first steps of its resumption."""
    for step in range(count_steps(tmp_path / "undisturbed"), 5):
        for second in range(0, 12, 3):
            folder = tmp_path / f"job-{step}-{second}"
            synced: set[int] = set()
            with pytest.raises(Crash):
                run_job(FailingStorage(str(folder), step, "after"), synced)
            with pytest.raises(Crash):
                run_job(FailingStorage(str(folder), second, "before"), synced)
                raise Crash
            check_visible(folder)
            run_job(LocalStorage(str(folder)), synced)
            assert verify(str(folder), None).num_rows == NUM_CHUNKS * CHUNK_ROWS


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_failing_step_is_an_output_error(tmp_path: Path, code: int) -> None:
    for step in range(count_steps(tmp_path / "undisturbed")):
        folder = tmp_path / f"job-{step}"
        synced: set[int] = set()
        storage = FailingStorage(str(folder), step, "before", lambda: OSError(code, os.strerror(code)))
        with pytest.raises(OutputError) as error:
            run_job(storage, synced)
        assert os.strerror(code) in str(error.value)
        check_visible(folder)
        run_job(LocalStorage(str(folder)), synced)
        assert verify(str(folder), None).num_rows == NUM_CHUNKS * CHUNK_ROWS


def test_short_writes_are_completed(tmp_path: Path) -> None:
    class ShortWrites(LocalStorage):
        def _write(self, fd: int, data: memoryview) -> int:
            return super()._write(fd, data[:7])

    run_job(ShortWrites(str(tmp_path / "short")), set())
    run_job(LocalStorage(str(tmp_path / "whole")), set())
    for part in (tmp_path / "whole/parts").iterdir():
        assert (tmp_path / "short/parts" / part.name).read_bytes() == part.read_bytes()


def test_lost_acknowledgement_of_an_entry(tmp_path: Path) -> None:
    """The entry is made, the answer never comes, the call is made again: NFS does this, and object stores."""

    class Twice(LocalStorage):
        def _link(self, source: Path, target: Path) -> None:
            super()._link(source, target)
            if "ledger" in target.parts:
                raise FileExistsError(errno.EEXIST, "File exists")

    run_job(Twice(str(tmp_path / "job")), set())
    assert verify(str(tmp_path / "job"), None).exit_code == 0
