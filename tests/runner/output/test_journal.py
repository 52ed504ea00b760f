"""The journal: what comes back after any damage is what was written, up to the damage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.chunk import ROW_COLUMN, Part
from runner.errors import InputError
from runner.journal import Journal, decode_frames, encode_frame
from runner.storage import LocalStorage, open_storage
from tests.runner.output.cases import SCHEMA, chunk, names, table

FRAMES = [encode_frame(index, 0, "id", table(index)) for index in range(4)]
ENDS = [sum(map(len, FRAMES[: index + 1])) for index in range(4)]
DATA = b"".join(FRAMES)


def whole_frames(position: int) -> int:
    """Frames that end at or before a byte."""
    return sum(end <= position for end in ENDS)


def check_prefix(data: bytes, at_least: int) -> None:
    frames = list(decode_frames(data))
    assert len(frames) >= at_least
    for index, frame in enumerate(frames):
        assert (frame.chunk_index, frame.file_id) == (index, "id")
        assert frame.table.equals(table(index))


@given(st.integers(0, len(DATA)))
@settings(max_examples=200, deadline=None)
def test_truncated_anywhere(length: int) -> None:
    check_prefix(DATA[:length], whole_frames(length))
    assert len(list(decode_frames(DATA[:length]))) == whole_frames(length)


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_any_byte_changed(position: int, mask: int) -> None:
    damaged = bytearray(DATA)
    damaged[position] ^= mask
    check_prefix(bytes(damaged), whole_frames(position))
    assert len(list(decode_frames(bytes(damaged)))) == whole_frames(position)


@given(st.integers(0, len(DATA)), st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_garbage_at_the_end(length: int, garbage: bytes) -> None:
    check_prefix(DATA[:length] + garbage, whole_frames(length))


def write(folder: Path, rows: dict[int, pa.Table], worker: str = "w", generation: int = 0) -> Journal:
    journal = Journal.open(str(folder), SCHEMA, worker)
    for index, found in rows.items():
        journal.append(index, found, "id", generation)
    journal.sync()
    return journal


def files(folder: Path) -> list[str]:
    return names(folder / "journal")


def test_several_journals_are_merged_and_the_last_row_wins(tmp_path: Path) -> None:
    first = write(tmp_path, {0: table(0).slice(0, 4), 1: table(1)}, "a")
    first.append(0, table(0, "newer").slice(2, 3), "id")
    first.close()
    write(tmp_path, {0: table(0).slice(7, 2)}, "b").close()
    recovered = Journal.open(str(tmp_path), SCHEMA, "c").recover()
    assert recovered[0].column(ROW_COLUMN).to_pylist() == [0, 1, 2, 3, 4, 7, 8]
    assert recovered[0].column("text").to_pylist() == [
        None,
        "text 1",
        "newer 2",
        "newer 3",
        "newer 4",
        "text 7",
        "text 8",
    ]
    assert recovered[1].equals(table(1))


def test_committed_and_unwanted_chunks_stay_out(tmp_path: Path) -> None:
    write(tmp_path, {0: table(0), 1: table(1), 2: table(2)}).close()
    done = {0: Part(chunk(0), "parts/part-00000000.parquet", 10, 1, 100, "0")}
    journal = Journal.open(str(tmp_path), SCHEMA, "c")
    assert journal.recover(done, lambda index: index != 2).keys() == {1}


def test_a_retry_takes_only_rows_of_its_generation(tmp_path: Path) -> None:
    write(tmp_path, {0: table(0, "old")}).close()
    write(tmp_path, {0: table(0, "retried").slice(3, 2)}, generation=1).close()
    done = {0: Part(chunk(0), "parts/part-00000000.parquet", 10, 1, 100, "0")}
    recovered = Journal.open(str(tmp_path), SCHEMA, "c").recover(done)
    assert recovered[0].column("text").to_pylist() == ["retried 3", "retried 4"]


def test_rows_of_another_content_of_the_file_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {0: table(0)}).close()
    journal = Journal.open(str(tmp_path), SCHEMA, "c")
    journal.recover()
    journal.check(chunk(0))
    journal.check(chunk(1, "other"))
    with pytest.raises(InputError, match=r"data/ä.jsonl: its content has changed"):
        journal.check(chunk(0, "other"))


def test_rows_of_another_schema_are_done_again(tmp_path: Path) -> None:
    write(tmp_path, {0: table(0)}).close()
    assert Journal.open(str(tmp_path), SCHEMA.remove(2), "c").recover() == {}


def test_unsynced_rows_of_a_committed_chunk_are_never_written(tmp_path: Path) -> None:
    journal = Journal.open(str(tmp_path), SCHEMA, "w")
    journal.append(0, table(0))
    journal.drop(0)
    journal.close()
    assert files(tmp_path) == []


def test_files_are_deleted_when_their_chunks_are_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalStorage, "roll_bytes", 1)
    journal = Journal.open(str(tmp_path), SCHEMA, "w")
    for index in range(50):
        journal.append(index, table(index))
        journal.sync()
        assert len(files(tmp_path)) <= 4
        if index >= 3:
            journal.drop(index - 3)
    journal.close()
    assert Journal.open(str(tmp_path), SCHEMA, "c").recover().keys() == {47, 48, 49}


def test_journal_of_an_ended_process_goes_with_its_chunks(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.runner.output.test_journal import *\n"
        "write(Path(sys.argv[1]), {0: table(0), 1: table(1)}); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={**os.environ, "PYTHONPATH": "."})
    running = write(tmp_path, {2: table(2)}, "alive")
    journal = Journal.open(str(tmp_path), SCHEMA, "c")
    assert journal.recover().keys() == {0, 1, 2}
    journal.drop(0)
    assert len(files(tmp_path)) == 2
    journal.drop(1)
    journal.drop(2)
    assert len(files(tmp_path)) == 1 and files(tmp_path)[0].startswith("alive")
    running.close()


def test_a_failed_sync_keeps_its_rows(tmp_path: Path) -> None:
    journal = write(tmp_path, {0: table(0)})
    storage = open_storage(str(tmp_path))
    journal.append(1, table(1), "id")
    appender = journal._appender
    assert appender is not None
    appender.close()  # the next write fails as on a full disk
    with pytest.raises(Exception, match="Bad file descriptor"):
        journal.sync()
    journal.sync()
    journal.close()
    assert Journal(storage, SCHEMA, "c").recover().keys() == {0, 1}
