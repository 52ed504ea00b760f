"""Columns of any type that Arrow has: kept as they are, an error of the row, or one message before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from runner.errors import ConfigError, InputError
from runner.job import run
from runner.tasks import chat, generate
from tests.fake_engine import FakeEngine
from tests.small_job import make_plan, read_output

TEXTS = ["a", "b", None, "a"]
LISTS = [[1, 2], None, [], [5]]
KEPT = {
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "repeats": pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0], pa.int32()), ["a", "a"]),
    "large string": pa.array(TEXTS, pa.large_string()),
    "string view": pa.array(TEXTS, pa.string_view()),
    "binary view": pa.array([b"a", b"\xff", None, b""], pa.binary_view()),
    "fixed binary": pa.array([b"ab", b"\xff\0", None, b"cd"], pa.binary(2)),
    "large list": pa.array(LISTS, pa.large_list(pa.int8())),
    "list view": pa.array(LISTS, pa.list_view(pa.int8())),
    "large list view": pa.array(LISTS, pa.large_list_view(pa.int64())),
    "list view in a struct": pa.array([{"x": x} for x in LISTS], pa.struct([("x", pa.list_view(pa.int8()))])),
    "fixed list": pa.array([[1, 2], None, [3, 4], [5, 6]], pa.list_(pa.int8(), 2)),
    "map": pa.array([[("k", 1)], None, [], [("j", None)]], pa.map_(pa.string(), pa.int32())),
    "structs": pa.array([[{"a": 1}], None, [None], [{"a": None}]]),
    "decimal": pa.array([1, None, 2, 3], pa.decimal256(60, 2)),
    "half": pa.array([1.5, None, 2, 3], pa.float16()),
    "seconds": pa.array([0, None, 2**50, -1], pa.timestamp("s", "UTC")),
    "no such zone": pa.array([0, None, 10**6, -(10**6)], pa.timestamp("ns", "Mars/Base")),
    "far day": pa.array([2**31 - 1, None, 0, 1], pa.date32()),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16, None, b"1" * 16, b"2" * 16], pa.binary(16))),
    "null": pa.nulls(4),
    "runs": pc.run_end_encode(pa.array([7, 7, None, 8])),
    "runs of text": pc.run_end_encode(pa.array(["a", "a", None, "b"])),
}


def write(folder: Path, column: pa.Array, suffix: str = "arrow") -> dict[str, str]:
    """A file with the columns `text` and `x`; the dataset."""
    table = pa.table({"text": [f"r{i}" for i in range(len(column))], "x": column})
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    path = folder / "rows" / f"0.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return {"path": str(path)}


def as_numbers(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Its values in Python; those that Python has no room for as the numbers that they are stored as."""
    stored = column.storage if isinstance(column, pa.ExtensionArray) else column
    if pa.types.is_timestamp(stored.type):
        return stored.cast(pa.timestamp("ms", stored.type.tz)).cast(pa.int64()).to_pylist()
    return (stored.cast(pa.int32()) if pa.types.is_date32(stored.type) else stored).to_pylist()


@pytest.mark.parametrize(
    ("name", "suffix"),
    [(name, suffix) for name in KEPT for suffix in ("arrow", "parquet") if (name[:4], suffix) != ("runs", "parquet")],
)
def test_values_are_kept(tmp_path: Path, name: str, suffix: str) -> None:
    plan = make_plan(tmp_path, dataset=write(tmp_path, KEPT[name], suffix))
    table = read_output(run(plan, FakeEngine()).folder)
    assert as_numbers(table.column("x")) == as_numbers(KEPT[name])
    assert table.column("error_code").null_count == 4


@pytest.mark.parametrize(
    "task",
    [
        generate.Config("generate", prompt="{{ text }} {{ x }}"),
        chat.Config("chat", messages="x", template="{% for m in messages %}{{ m.content }}{% endfor %}"),
    ],
    ids=["generate", "chat"],
)
@pytest.mark.parametrize("name", ["no such zone", "far day"])
def test_a_value_that_python_cannot_hold_is_an_error_of_its_row(tmp_path: Path, name: str, task: Any) -> None:
    plan = make_plan(tmp_path, dataset=write(tmp_path, KEPT[name]), task=task, max_error_rate=1.0)
    table = read_output(run(plan, FakeEngine()).folder)
    codes = table.column("error_code").to_pylist()
    assert codes[:2] == ["unreadable_row", "null_input"]
    assert f"column x: {KEPT[name].type} of no Python value (" in table.column("error_message").to_pylist()[0]
    if name == "far day":
        assert codes[2:] == ([None, None] if task.name == "generate" else ["bad_messages"] * 2)


def test_a_sampling_column_that_python_cannot_hold_is_an_error_of_its_row(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, dataset=write(tmp_path, KEPT["far day"]), sampling_columns={"top_k": "x"})
    table = read_output(run(plan, FakeEngine()).folder)
    assert table.column("error_code").to_pylist()[0] == "unreadable_row"


def test_what_parquet_cannot_hold_is_said_before_anything_is_made(tmp_path: Path) -> None:
    months = pa.array([pa.MonthDayNano([1, 2, 3])] * 2)
    dataset = write(tmp_path, months)
    with pytest.raises(ConfigError, match=r"output.keep_columns: column 'x' is month_day_nano_interval, which Parquet"):
        run(make_plan(tmp_path, dataset=dict(dataset)), FakeEngine())
    assert not (tmp_path / "out").exists()
    summary = run(make_plan(tmp_path, dataset=dict(dataset), output={"keep_columns": ["text"]}), FakeEngine())
    assert summary.num_rows == 2 and summary.num_errors == 0


def test_a_time_beyond_parquet_is_found_when_it_is_read(tmp_path: Path) -> None:
    dataset = write(tmp_path, pa.array([2**62], pa.timestamp("s")))
    engine = FakeEngine()
    with pytest.raises(InputError, match=r"column x is timestamp\[s\] \(.*out of bounds.*expected timestamp\[ms\]"):
        run(make_plan(tmp_path, dataset=dataset), engine)
    assert engine.num_requests == 0


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_a_column_name_that_is_there_twice(tmp_path: Path, suffix: str) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    path = tmp_path / f"0.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(InputError, match=rf"0\.{suffix}: columns text are there twice; expected each name once"):
        run(make_plan(tmp_path, dataset={"path": str(path)}), FakeEngine())
