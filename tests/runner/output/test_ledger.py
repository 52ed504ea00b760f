"""Commits: one of many attempts, refusals by name, retries in place, late comers."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import duckdb
import numpy as np
import orjson
import pandas
import polars
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from runner.chunk import ROW_COLUMN, Part
from runner.config import OutputConfig
from runner.errors import ConfigError, InputError, InternalError, OutputError
from runner.ledger import Ledger
from runner.sink import Sink
from runner.storage import LocalStorage
from runner.verify import verify
from tests.runner.output.cases import FINGERPRINT, SCHEMA, chunk, names, table


@pytest.fixture
def folder(weird_tmp_path: Path) -> str:
    return str(weird_tmp_path / "job")


def sink_of(folder: str) -> Sink:
    return Sink(folder, SCHEMA, OutputConfig(), {"plan": "{}"})


def make_job(folder: str, num_chunks: int = 3) -> Ledger:
    ledger, sink = Ledger.open(folder, FINGERPRINT), sink_of(folder)
    for index in range(num_chunks):
        assert ledger.commit(sink.write(chunk(index), table(index), 1))
    return ledger


def texts(folder: str) -> list[str | None]:
    return pq.read_table(f"{folder}/parts").column("text").to_pylist()


def test_readers_of_all_kinds_see_the_rows(folder: str) -> None:
    import datasets

    datasets.disable_progress_bars()
    make_job(folder)
    parts = f"{folder}/parts"
    rows = list(range(30))
    escaped = parts.replace("'", "''")
    assert duckdb.sql(f"select _row from '{escaped}/*.parquet'").fetchnumpy()["_row"].tolist() == rows
    assert polars.read_parquet(parts)[ROW_COLUMN].to_list() == rows
    assert pandas.read_parquet(parts)[ROW_COLUMN].tolist() == rows
    assert pa.dataset.dataset(parts).to_table().column(ROW_COLUMN).to_pylist() == rows
    loaded = datasets.Dataset.from_parquet([f"{parts}/{name}" for name in names(parts)])
    assert loaded[ROW_COLUMN][:] == rows
    assert polars.read_parquet(parts)["embedding"].to_list()[1] == [1.0, 2.0, 1.0]


def test_provenance_and_settings_of_a_part(folder: str) -> None:
    Ledger.open(folder, FINGERPRINT)
    output = OutputConfig(compression="gzip", compression_level=3, row_group_rows=4)
    part = Sink(folder, SCHEMA, output, {"plan": '{"a": 1}'}).write(chunk(0), table(0), 1)
    file = pq.ParquetFile(f"{folder}/{part.staged}")
    assert file.metadata.row_group(0).column(0).compression == "GZIP"
    assert [file.metadata.row_group(group).num_rows for group in range(3)] == [4, 4, 2]
    metadata = file.schema_arrow.metadata
    assert json.loads(metadata[b"plan"]) == {"a": 1}
    assert json.loads(metadata[b"chunk"]) == chunk(0).identity()
    assert part.num_bytes == Path(folder, part.staged).stat().st_size


@pytest.mark.parametrize("rows", [[0, 0], [1, 0], [9, 10], [-1, 0]])
def test_rows_that_are_not_the_chunks_are_refused(folder: str, rows: list[int]) -> None:
    wrong = table(0, num_rows=2).set_column(1, SCHEMA.field(1), pa.array(rows, pa.int64()))
    with pytest.raises(InternalError, match="chunk 0"):
        sink_of(folder).write(chunk(0), wrong, 1)


def test_nothing_is_visible_before_the_commit(folder: str) -> None:
    ledger = Ledger.open(folder, FINGERPRINT)
    sink_of(folder).write(chunk(0), table(0), 1)
    assert names(f"{folder}/parts") == []
    assert ledger.done() == {}


def test_the_second_committer_loses_quietly(folder: str) -> None:
    ledger = make_job(folder, 1)
    late = sink_of(folder).write(chunk(0), table(0, "late"), 1)
    assert not Ledger.open(folder, FINGERPRINT).commit(late)
    assert names(f"{folder}/staging") == []
    assert "late 5" not in texts(folder)
    first = ledger.done()[0]
    assert ledger.commit(first)  # again: nothing changes
    assert texts(folder) == table(0).column("text").to_pylist()


def test_resume_keeps_what_a_slow_writer_has_staged(folder: str) -> None:
    slow = Ledger.open(folder, FINGERPRINT)
    part = sink_of(folder).write(chunk(0), table(0, "slow"), 1)
    assert Ledger.open(folder, FINGERPRINT).done() == {}
    assert slow.commit(part)
    assert texts(folder)[5] == "slow 5"


def test_stale_attempt_after_the_end_changes_nothing(folder: str) -> None:
    ledger = make_job(folder)
    stale = Ledger.open(folder, FINGERPRINT)
    part = sink_of(folder).write(chunk(1), table(1, "stale"), 1)
    assert ledger.finish(3, {})
    before = {name: Path(folder, "parts", name).read_bytes() for name in names(f"{folder}/parts")}
    assert not stale.commit(part)
    assert before == {name: Path(folder, "parts", name).read_bytes() for name in names(f"{folder}/parts")}
    assert verify(folder, None).exit_code == 0


def test_entered_and_not_published_is_completed(folder: str) -> None:
    class StopsBeforePublishing(LocalStorage):
        def publish(self, staged: str, path: str) -> bool:
            raise KeyboardInterrupt

    ledger = Ledger.open(StopsBeforePublishing(folder), FINGERPRINT)
    part = sink_of(folder).write(chunk(0), table(0), 1)
    with pytest.raises(KeyboardInterrupt):
        ledger.commit(part)
    report = verify(folder, None)
    assert (report.num_rows, report.exit_code) == (10, 75), report.text()
    assert Ledger.open(folder, FINGERPRINT).done().keys() == {0}
    assert len(texts(folder)) == 10


def test_retry_replaces_a_part_in_place(folder: str) -> None:
    ledger, sink = make_job(folder), sink_of(folder)
    ledger.finish(3, {})
    part = sink.write(chunk(1), table(1, "again", num_errors=0), 0, generation=1)
    assert ledger.commit(part)
    assert len(names(f"{folder}/parts")) == 3 and texts(folder)[10:20] == [f"again {row}" for row in range(10)]
    late = sink.write(chunk(1), table(1, "late", num_errors=0), 0, generation=1)
    assert not ledger.commit(late)
    assert Ledger.open(folder, FINGERPRINT).done()[1].num_errors == 0
    assert verify(folder, None).num_errors == 2
    with pytest.raises(InternalError, match="generation 3"):
        ledger.commit(sink.write(chunk(1), table(1), 1, generation=3))


def test_writer_paused_before_publishing_cannot_undo_a_retry(folder: str) -> None:
    paused: list[tuple[str, str]] = []

    class Paused(LocalStorage):
        def publish(self, staged: str, path: str) -> bool:
            paused.append((staged, path))
            return True

    slow = Ledger.open(Paused(folder), FINGERPRINT)
    slow.commit(sink_of(folder).write(chunk(0), table(0, "old"), 1))
    other = Ledger.open(folder, FINGERPRINT)  # publishes it
    other.commit(sink_of(folder).write(chunk(0), table(0, "new"), 1, generation=1))
    for staged, path in paused:
        assert not LocalStorage(folder).publish(staged, path)
    assert texts(folder)[5] == "new 5"


def test_retry_staged_by_another_survives_a_recovery(folder: str) -> None:
    ledger = make_job(folder, 1)
    part = sink_of(folder).write(chunk(0), table(0, "new"), 1, generation=1)
    Ledger.open(folder, FINGERPRINT)
    assert ledger.commit(part)
    assert texts(folder)[5] == "new 5"


def test_another_job_is_refused_with_the_keys(folder: str) -> None:
    Ledger.open(folder, FINGERPRINT)
    with pytest.raises(
        OutputError, match=r"holds another job; .*task.prompt is 'p' there, 'q' here.*x is 'absent' there"
    ):
        Ledger.open(folder, {**FINGERPRINT, "task.prompt": "q", "x": "1"})
    second = Ledger.open(folder, {**FINGERPRINT, "task.prompt": "q"}, on_change="new")
    third = Ledger.open(folder, {**FINGERPRINT, "task.prompt": "r"}, on_change="new")
    again = Ledger.open(folder, {**FINGERPRINT, "task.prompt": "q"}, on_change="new")
    assert [second.folder, third.folder, again.folder] == [f"{folder}-2", f"{folder}-3", f"{folder}-2"]


def test_folder_of_someone_else_is_refused(folder: str) -> None:
    Path(folder, "parts").mkdir(parents=True)
    Path(folder, "parts", "mine.parquet").touch()
    with pytest.raises(OutputError, match="has files but no fingerprint"):
        Ledger.open(folder, FINGERPRINT)
    with pytest.raises(OutputError, match=r"no fingerprint\.json"):
        verify(f"{folder}-not", None)
    with pytest.raises(OutputError, match="s3://bucket/job with credentials or options in the URL"):
        Ledger.open("s3://user:secret@bucket/job", FINGERPRINT)


def _open_and_commit(folder: str, number: int, start: float, results: multiprocessing.Queue[tuple[int, str]]) -> None:
    time.sleep(max(0.0, start - time.time()))
    try:
        ledger = Ledger.open(folder, {"number": str(number % 2)})
        sink = sink_of(folder)
        won = sum(ledger.commit(sink.write(chunk(i), table(i, f"by {number}"), 1)) for i in range(5))
        results.put((number, str(won)))
    except OutputError as error:
        results.put((number, str(error)))


def test_jobs_started_in_the_same_instant_do_not_mix(folder: str) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    start = time.time() + 0.3
    processes = [context.Process(target=_open_and_commit, args=(folder, n, start, results)) for n in range(4)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    winners = [number for number, text in found.items() if text.isdigit()]
    assert {number % 2 for number in winners} in ({0}, {1}) and len(winners) == 2
    assert sum(int(found[number]) for number in winners) == 5
    assert all("holds another job" in found[number] for number in found.keys() - set(winners))
    report = verify(folder, None)
    assert (report.num_rows, report.num_problems) == (50, 0), report.text()


def test_changed_input_is_refused_by_name(folder: str) -> None:
    make_job(folder)
    ledger = Ledger.open(folder, FINGERPRINT)
    ledger.check(chunk(0))
    ledger.check(chunk(7, "whatever"))
    with pytest.raises(InputError, match=r"data/ä.jsonl: its content has changed; expected what chunk 1"):
        ledger.check(chunk(1, "other"))
    with pytest.raises(InputError, match="chunks; expected also chunk 2"):
        ledger.finish(2, {})


def test_finish_needs_all_chunks_and_no_strays(folder: str) -> None:
    ledger = make_job(folder)
    assert not ledger.finish(4, {}) and not ledger.finished
    stray = Path(folder, "parts", "part-00000009.parquet")
    stray.touch()
    with pytest.raises(OutputError, match="part-00000009"):
        ledger.finish(3, {})
    stray.unlink()
    assert ledger.finish(3, {"rows": np.int64(30)}) and ledger.finished
    assert Ledger.open(folder, FINGERPRINT).finished


def test_missing_part_and_damaged_entry_are_told(folder: str) -> None:
    make_job(folder)
    part, entry = Path(folder, "parts/part-00000001.parquet"), Path(folder, "ledger/00000001.json")
    part.unlink()
    with pytest.raises(OutputError, match=r"part-00000001.parquet: is missing"):
        Ledger.open(folder, FINGERPRINT)
    entry.unlink()
    assert Ledger.open(folder, FINGERPRINT).done().keys() == {0, 2}  # as the message says: it is done again
    entry.write_bytes(b"{}")
    with pytest.raises(OutputError, match=r"00000001.json: cannot be read"):
        Ledger.open(folder, FINGERPRINT)


def test_large_ledger_is_read_in_seconds(folder: str) -> None:
    num_chunks = 3000
    Ledger.open(folder, FINGERPRINT)
    Path(folder, "parts").mkdir(parents=True)
    Path(folder, "ledger").mkdir(parents=True)
    for index in range(num_chunks):
        record = Part(chunk(index), f"parts/part-{index:08d}.parquet", 10, 1, 100, "0" * 32, "staging/x")
        data = {"version": 1, **{name: getattr(record, name) for name in Part.__slots__}}
        Path(folder, "ledger", f"{index:08d}.json").write_bytes(
            orjson.dumps({**data, "chunk": record.chunk.identity()})
        )
        Path(folder, record.path).touch()
    assert len(Ledger.open(folder, FINGERPRINT).done()) == num_chunks
    assert [name for name in names(f"{folder}/ledger") if name.startswith("rollup-")]
    Path(folder, "ledger/00000005.json").unlink()
    reads: list[str] = []

    class Counting(LocalStorage):
        def read(self, path: str) -> bytes | None:
            reads.append(path)
            return super().read(path)

    assert Ledger.open(Counting(folder), FINGERPRINT).done().keys() == set(range(num_chunks)) - {5}
    assert len(reads) < 10


def test_settings_that_parquet_does_not_take(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"output.compression_level"):
        Sink(folder, SCHEMA, OutputConfig(compression="snappy", compression_level=3), {})
