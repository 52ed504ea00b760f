"""What every source promises, on files that other programs wrote. Each format module must have a writer here."""

from __future__ import annotations

import json
import pkgutil
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import polars
import pyarrow as pa
import pytest

import runner.source
from runner.chunk import ERROR_COLUMN, ROW_COLUMN, Chunk
from runner.config import DatasetConfig
from runner.errors import InputError
from runner.source import Source, open_source

NUM_ROWS = 1013
ROWS = [
    {
        "id": row,
        "text": f'Zeile {row}, "zitiert"\nünd 漢字 {"x" * (row % 50)}' if row % 11 else None,
        "score": row / 8 if row % 3 else None,
        "even": row % 2 == 0,
    }
    for row in range(NUM_ROWS)
]


def _write_parquet(folder: Path) -> str:
    polars.DataFrame(ROWS).write_parquet(folder / "a.parquet", row_group_size=150)
    return str(folder / "a.parquet")


def _write_arrow(folder: Path) -> str:
    polars.DataFrame(ROWS).write_ipc(folder / "a.arrow", compression="zstd", record_batch_size=77)
    return str(folder / "a.arrow")


def _write_jsonl(folder: Path) -> str:
    polars.DataFrame(ROWS).write_ndjson(folder / "a.jsonl")
    return str(folder / "a.jsonl")


def _write_csv(folder: Path) -> str:
    polars.DataFrame(ROWS).write_csv(folder / "a.csv")
    return str(folder / "a.csv")


def _write_huggingface(folder: Path) -> str:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def _write_openai_batch(folder: Path) -> str:
    lines = [
        {
            "custom_id": f"r{row}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": f"frage {row}"}], "max_tokens": row},
        }
        for row in range(NUM_ROWS)
    ]
    path = folder / "batch.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


WRITERS: dict[str, Callable[[Path], str]] = {
    name.removeprefix("_write_"): function for name, function in globals().items() if name.startswith("_write_")
}
FORMATS = [
    module.name for module in pkgutil.iter_modules(runner.source.__path__) if module.name not in runner.source._SHARED
]


@pytest.fixture(params=FORMATS)
def dataset(request: pytest.FixtureRequest, weird_tmp_path: Path) -> DatasetConfig:
    path = WRITERS[request.param](weird_tmp_path)
    return DatasetConfig(path, format=request.param, chunk_rows=100)


def read_all(source: Source, chunks: list[Chunk], columns: list[str] | None = None) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        batch = source.read(chunk, columns)
        assert ERROR_COLUMN not in batch.schema.names
        for row in batch.to_pylist():
            number = row.pop(ROW_COLUMN)
            assert number not in found
            assert chunk.start <= number < chunk.start + chunk.num_rows
            found[number] = row
    return found


def test_rows_are_the_writers(dataset: DatasetConfig) -> None:
    source = open_source(dataset)
    found = read_all(source, list(source.chunks()))
    assert list(found) == list(range(NUM_ROWS))
    if dataset.format == "openai_batch":
        assert found[5]["messages"] == [{"role": "user", "content": "frage 5"}]
        assert found[7]["max_tokens"] == 7 and found[7]["temperature"] is None
    else:
        assert list(found.values()) == ROWS


def test_numbering_is_stable_and_without_gaps(dataset: DatasetConfig) -> None:
    first = list(open_source(dataset).chunks())
    source = open_source(dataset)
    assert list(source.chunks()) == first == list(source.chunks())
    assert [chunk.index for chunk in first] == list(range(len(first)))
    assert [chunk.start for chunk in first] == list(range(0, NUM_ROWS, 100))
    assert sum(chunk.num_rows for chunk in first) == NUM_ROWS


def test_any_order_gives_the_same_rows(dataset: DatasetConfig) -> None:
    source = open_source(dataset)
    chunks = list(source.chunks())
    ordered = read_all(source, chunks)
    random.Random(0).shuffle(chunks)
    assert read_all(source, chunks) == ordered
    assert read_all(open_source(dataset), chunks[:3]).items() <= ordered.items()


def test_reading_while_chunks_are_listed(dataset: DatasetConfig) -> None:
    source = open_source(dataset)
    found: dict[int, dict[str, Any]] = {}
    for chunk in source.chunks():
        found |= read_all(source, [chunk])
    assert len(found) == NUM_ROWS


def test_projection(dataset: DatasetConfig) -> None:
    source = open_source(dataset)
    chunk = list(source.chunks())[2]
    names = [source.schema.names[2], source.schema.names[0]]
    whole, some, none = source.read(chunk, None), source.read(chunk, names), source.read(chunk, [])
    assert some.schema.names == [*names, ROW_COLUMN]
    assert none.schema.names == [ROW_COLUMN]
    assert some.equals(whole.select([*names, ROW_COLUMN])) and none.equals(whole.select([ROW_COLUMN]))
    assert whole.schema == source.schema.append(pa.field(ROW_COLUMN, pa.int64()))
    with pytest.raises(InputError, match=r"no column nowhere"):
        source.read(chunk, ["nowhere"])


@pytest.mark.parametrize("limit", [0, 1, 99, 100, 101, 700, 5000])
def test_limit_is_exact(dataset: DatasetConfig, limit: int) -> None:
    source = open_source(_with(dataset, limit=limit))
    assert list(read_all(source, list(source.chunks()))) == list(range(min(limit, NUM_ROWS)))


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("id >= 500 and score < 100", "id >= 500 and score < 100"),
        ("text is null or not even", "text is null or not even"),
        ("id in (3, 5, 900) or 20 < id <= 25", "id in (3, 5, 900) or (20 < id and id <= 25)"),
        ("score is not null and id != 4 and even == true", "score is not null and id <> 4 and even"),
        ("id > 100000", "id > 100000"),
    ],
)
@pytest.mark.parametrize("limit", [None, 7, 300])
def test_filter_and_limit_as_duckdb(dataset: DatasetConfig, text: str, sql: str, limit: int | None) -> None:
    if dataset.format == "openai_batch":
        pytest.skip("its columns are others")
    rows = pa.Table.from_pylist(ROWS)
    query = f"select id from rows where {sql} order by id" + (f" limit {limit}" if limit is not None else "")
    expected = [row[0] for row in duckdb.sql(query).fetchall()]
    assert rows.num_rows == NUM_ROWS
    source = open_source(_with(dataset, filter=text, limit=limit))
    chunks = list(source.chunks())
    random.Random(1).shuffle(chunks)
    found = read_all(source, chunks, ["id"])
    assert sorted(found) == expected
    assert all(row["id"] == number for number, row in found.items())


def test_changed_file_is_refused_by_name(dataset: DatasetConfig) -> None:
    source = open_source(dataset)
    chunk = next(iter(source.chunks()))
    folder = Path(dataset.path)
    file = next(folder.glob("*.arrow")) if folder.is_dir() else folder
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="its content has changed") as error:
        source.read(chunk, None)
    assert file.name in str(error.value)


def test_a_file_that_changes_while_it_is_read_is_refused(dataset: DatasetConfig) -> None:
    source = open_source(replace(dataset, chunk_rows=2))
    chunks = source.chunks()
    first, second = next(chunks), next(chunks)
    source.read(first, None)
    folder = Path(dataset.path)
    file = next(folder.glob("*.arrow")) if folder.is_dir() else folder
    file.touch()
    assert source.read(first, None).num_rows == 2
    data = file.read_bytes()
    with file.open("ab") as stream:
        stream.write(data)
    with pytest.raises(InputError, match="its content has changed"):
        source.read(second, None)


def _with(dataset: DatasetConfig, **changes: Any) -> DatasetConfig:
    import dataclasses

    return dataclasses.replace(dataset, **changes)
