"""Paths and files as people have them: folders of other systems, broken lines, odd CSV, empty and damaged files."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import runner.config
import runner.source.jsonl
import runner.source.lines
from runner.chunk import ERROR_COLUMN, FILE_COLUMN, ROW_COLUMN
from runner.config import DatasetConfig
from runner.errors import ConfigError, InputError
from runner.source import open_source
from runner.source.lines import QuotedScanner
from runner.source.paths import InputFile, find_files, shown_url


def rows_of(path: str | Path, columns: list[str] | None = None, **settings: Any) -> list[dict[str, Any]]:
    source = open_source(DatasetConfig(str(path), **settings))
    return [row for chunk in source.chunks() for row in source.read(chunk, columns).to_pylist()]


# Paths


def test_hive_folders_as_spark_and_duckdb_write_them(weird_tmp_path: Path) -> None:
    folder = weird_tmp_path / "table"
    duckdb.sql(
        f"""copy (select i as id, i % 3 as year, case when i % 2 = 0 then 'de / at' else null end as lang
        from range(60) t(i)) to '{str(folder).replace("'", "''")}' (format parquet, partition_by (year, lang))"""
    )
    (folder / "_SUCCESS").touch()
    (folder / "year=0" / ".part-0.parquet.crc").write_bytes(b"crc")
    (folder / "_temporary").mkdir()
    (folder / "_temporary" / "x.parquet").write_bytes(b"not finished")
    rows = rows_of(folder)
    assert sorted((row["id"], row["year"], row["lang"]) for row in rows) == [
        (i, i % 3, "de / at" if i % 2 == 0 else None) for i in range(60)
    ]
    filtered = rows_of(folder, filter="year == 1 and lang is null", columns=["id"])
    assert sorted(row["id"] for row in filtered) == [i for i in range(60) if i % 3 == 1 and i % 2]
    assert {row["year"] for row in rows_of(folder / "year=2")} == {2}


def test_files_are_in_natural_order_and_globs_reach_folders(weird_tmp_path: Path) -> None:
    for number in (10, 9, 1, 2):
        (weird_tmp_path / f"d{number % 2}").mkdir(exist_ok=True)
        polars.DataFrame({"n": [number]}).write_parquet(weird_tmp_path / f"d{number % 2}" / f"part-{number}.parquet")
    (weird_tmp_path / "README.md").write_text("about")
    assert [row["n"] for row in rows_of(weird_tmp_path)] == [2, 10, 1, 9]
    assert [row["n"] for row in rows_of(f"{weird_tmp_path}/**/part-1*.parquet")] == [10, 1]
    assert [row["n"] for row in rows_of(f"{weird_tmp_path}/d[1]/*.parquet")] == [1, 9]


def test_brackets_in_a_folders_own_name(tmp_path: Path) -> None:
    folder = tmp_path / "run [1]*"
    folder.mkdir()
    polars.DataFrame({"n": [1]}).write_parquet(folder / "a.parquet")
    assert rows_of(folder / "*.parquet") == rows_of(folder / "a.parquet") == [{"n": 1, ROW_COLUMN: 0}]


def test_urls() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("a", "b"):
        memory.pipe(f"/io-test/lang={name}/x.jsonl", b'{"t": 1}\n{"t": 2}\n')
    assert [row["lang"] for row in rows_of("memory://io-test", chunk_rows=1)] == ["a", "a", "b", "b"]
    assert len(rows_of("memory://io-test/*/x.jsonl")) == 4
    source = open_source(DatasetConfig("memory://io-test/lang=a/x.jsonl"))
    assert next(iter(source.chunks())).file == "memory://io-test/lang=a/x.jsonl"
    with pytest.raises(InputError, match="nothing at memory://io-test/none"):
        open_source(DatasetConfig("memory://io-test/none"))
    with pytest.raises(InputError, match="fsspec can open"):
        open_source(DatasetConfig("nosuch://x/y.parquet", remote=True))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:secret@bucket/a/b.parquet", "s3://bucket/a/b.parquet"),
        ("https://u:secret@host/x.csv?sig=secret#secret", "https://host/x.csv"),
        ("simplecache::https://host/x.csv?secret", "simplecache::https://host/x.csv"),
        ("plain/file?.csv", "plain/file?.csv"),
    ],
)
def test_credentials_are_never_shown(url: str, shown: str) -> None:
    assert shown_url(url) == shown
    with pytest.raises(InputError) as error:
        InputFile(shown, "http://user:secret@127.0.0.1:9/x.csv?token=secret").open()
    assert "secret" not in str(error.value)


def test_identity_sees_size_beginning_and_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    data = bytearray(b"x" * 300_000)
    found = set()
    for change in (None, 0, 299_999, "longer"):
        changed = bytearray(data)
        if change == "longer":
            changed += b"x"
        elif isinstance(change, int):
            changed[change] ^= 1
        path.write_bytes(changed)
        found.add(find_files(str(path))[0].identity())
    assert len(found) == 4


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.parquet", tmp_path / "*.parquet"):
        with pytest.raises(InputError, match=r"dataset\.path: nothing at"):
            open_source(DatasetConfig(str(path)))


def test_formats_are_told_apart_or_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    (tmp_path / "b.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "c.dat").write_text('{"x": 1}\n')
    with pytest.raises(ConfigError, match="1 csv, 1 jsonl"):
        open_source(DatasetConfig(str(tmp_path)))
    with pytest.raises(InputError, match=r"c.dat has a suffix that tells no format"):
        open_source(DatasetConfig(str(tmp_path / "c.dat")))
    with pytest.raises(ConfigError, match="did you mean parquet"):
        open_source(DatasetConfig(str(tmp_path), format="parket"))
    assert rows_of(tmp_path, format="csv") == rows_of(tmp_path / "c.dat", format="jsonl") == [{"x": 1, ROW_COLUMN: 0}]


# Parquet


def test_chunks_do_not_depend_on_row_groups(tmp_path: Path) -> None:
    table = pa.table({"id": range(1000)})
    for name, size in (("a", 7), ("b", 1000)):
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=size)
        source = open_source(DatasetConfig(str(tmp_path / f"{name}.parquet"), chunk_rows=64))
        assert [(chunk.start, chunk.num_rows) for chunk in source.chunks()] == [
            (start, min(64, 1000 - start)) for start in range(0, 1000, 64)
        ]


def test_row_groups_that_cannot_pass_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": range(1000), "text": ["t"] * 1000}), path, row_group_size=100)
    column = pq.ParquetFile(path).metadata.row_group(3).column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    assert len(rows_of(path, filter="id < 300 or id >= 400", chunk_rows=130)) == 900
    with pytest.raises(InputError, match=r"a.parquet: rows \d+ to \d+ cannot be read"):
        rows_of(path, chunk_rows=130)


def test_columns_of_an_earlier_job_are_left_out(tmp_path: Path) -> None:
    table = pa.table({FILE_COLUMN: ["x"], ROW_COLUMN: [77], "text": ["t"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows_of(tmp_path) == [{"text": "t", ROW_COLUMN: 0}]


def test_files_of_several_writers_have_one_schema(tmp_path: Path) -> None:
    rows = {"label": ["a", "b"], "n": [1, 2], "tags": [["x"], None]}
    pandas.DataFrame(rows).astype({"label": "category", "n": "int32"}).to_parquet(tmp_path / "a.parquet")
    polars.DataFrame(rows).with_columns(polars.col("label").cast(polars.Categorical)).write_parquet(
        tmp_path / "b.parquet"
    )
    duckdb.sql(f"copy (select * from (values ('a', 1, ['x'])) t(label, n, tags)) to '{tmp_path}/c.parquet'")
    source = open_source(DatasetConfig(str(tmp_path)))
    assert [str(data_type) for data_type in source.schema.types[:2]] == ["string", "int32"]
    assert [(row["label"], row["n"], row["tags"]) for row in rows_of(tmp_path)] == [
        ("a", 1, ["x"]),
        ("b", 2, None),
        ("a", 1, ["x"]),
        ("b", 2, None),
        ("a", 1, ["x"]),
    ][:5]


def test_files_without_common_columns_are_refused_by_name(tmp_path: Path) -> None:
    polars.DataFrame({"a": [1], "b": ["x"]}).write_parquet(tmp_path / "1.parquet")
    polars.DataFrame({"a": [1]}).write_parquet(tmp_path / "2.parquet")
    with pytest.raises(InputError, match=r"2.parquet: no column b; expected the columns of .*1.parquet"):
        list(open_source(DatasetConfig(str(tmp_path))).chunks())
    polars.DataFrame({"a": [[1]], "b": ["x"]}).write_parquet(tmp_path / "2.parquet")
    with pytest.raises(InputError, match=r"2.parquet: column a is list"):
        list(open_source(DatasetConfig(str(tmp_path))).chunks())


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv", "arrow"])
def test_no_rows_is_one_empty_chunk(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    frame = polars.DataFrame({"text": []}, schema={"text": polars.String})
    if suffix == "parquet":
        frame.write_parquet(path)
    elif suffix == "arrow":
        frame.write_ipc(path)
    else:
        path.write_text("" if suffix == "jsonl" else "text\n")
    source = open_source(DatasetConfig(str(path)))
    (chunk,) = source.chunks()
    assert (chunk.index, chunk.num_rows, source.read(chunk, None).num_rows) == (0, 0, 0)
    assert source.schema.names == ([] if suffix == "jsonl" else ["text"])


def test_text_in_another_encoding_is_an_error_of_its_row_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("id,text\n1,Größe\n".encode("latin-1"))
    (row,) = rows_of(tmp_path / "a.csv")
    assert row["text"] is None and row[ERROR_COLUMN].endswith("expected text in UTF-8")


def test_empty_row_groups(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2, 3]})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for piece in (table.slice(0, 0), table.slice(0, 2), table.slice(0, 0), table.slice(2), table.slice(0, 0)):
            writer.write_table(piece)
    assert [row["id"] for row in rows_of(tmp_path, chunk_rows=1)] == [1, 2, 3]
    assert [row["id"] for row in rows_of(tmp_path, filter="id > 1")] == [2, 3]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.zst"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    frame = polars.DataFrame({"text": [random.Random(i).randbytes(20).hex() for i in range(20_000)]})
    if name.endswith("parquet"):
        frame.write_parquet(path)
    elif name.endswith("arrow"):
        frame.write_ipc(path)
    elif name.endswith("gz"):
        path.write_bytes(gzip.compress(frame.write_ndjson().encode()))
    else:
        path.write_bytes(zstandard.compress(frame.write_csv().encode()))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=name):
        rows_of(path, chunk_rows=1000)


# JSON Lines


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2"])
def test_bad_lines_are_error_rows(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.source.lines, "BLOCK_BYTES", 11)
    lines = [
        b'\xef\xbb\xbf{"id": 0, "m": [{"role": "user", "content": "\xc3\xa4"}]}',
        b'{"id": 1, "m": null}\r',
        b"",
        b'{"id": 3, broken',
        b'{"id": "four"}',
        b"[5]",
        b'{"id": 6.5}',
        b'{"id": 7.0, "new": true}',
        b'{"id": 8, "m": "x\xff"}',
        b'{"id": 9, "m": [{"content": "c"}]}',
        b"[" * 100_000,
        b'{"id": 11}',
    ]
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(b"\n".join(lines[:2])))
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    assert open_source(DatasetConfig(str(path))).schema == pa.schema([("id", pa.int64()), ("m", messages)])
    monkeypatch.setattr(runner.source.jsonl, "SAMPLE_ROWS", 2)
    path.write_bytes(compress(b"\n".join(lines)))
    whole = rows_of(path)
    assert [row[ROW_COLUMN] for row in whole] == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    errors = {row[ROW_COLUMN]: row[ERROR_COLUMN] for row in whole if row[ERROR_COLUMN]}
    assert errors.keys() == {3, 4, 5, 6, 8, 10}
    assert (
        errors[4] == "column id: found 'four'; expected int64" and errors[6] == "column id: found 6.5; expected int64"
    )
    assert errors[5] == "a JSON list; expected one object a line" and errors[3].startswith("not valid JSON")
    assert [row["id"] for row in whole] == [0, 1, None, None, None, None, 7, None, 9, None, 11]
    assert whole[8]["m"] == [{"role": None, "content": "c"}]
    for size in (1, 2, 5):
        assert [(row["id"], row[ROW_COLUMN]) for row in rows_of(path, chunk_rows=size)] == [
            (row["id"], row[ROW_COLUMN]) for row in whole
        ]
    assert [row[ROW_COLUMN] for row in rows_of(path, limit=4)] == [0, 1, 3, 4]
    kept = [3, 4, 5, 6, 8, 9, 10, 11]
    assert [row[ROW_COLUMN] for row in rows_of(path, filter="id > 8")] == kept
    for columns in ([], ["m"], ["id", "m"], None):  # what is read has no say in what passes
        assert [row[ROW_COLUMN] for row in rows_of(path, columns, filter="id > 8", limit=6)] == kept[:6]
        assert [row[ROW_COLUMN] for row in rows_of(path, columns, filter="m is null and id < 5")] == [
            1,
            3,
            4,
            5,
            6,
            8,
            10,
        ]


def test_types_come_from_many_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": None, "n": 1, "mixed": 1, "m": []} for _ in range(500)]
    rows += [{"a": "late", "n": 0.5, "mixed": "x", "m": [{"k": [1]}], "map": {f"k{i}": i}} for i in range(500)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(DatasetConfig(str(tmp_path)))
    assert [str(data_type) for data_type in source.schema.types] == [
        "string",
        "double",
        "string",
        "list<item: struct<k: list<item: int64>>>",
        "string",
    ]
    found = rows_of(tmp_path)
    assert found[0] == {"a": None, "n": 1.0, "mixed": "1", "m": [], "map": None, ROW_COLUMN: 0}
    assert found[999]["mixed"] == "x" and json.loads(found[999]["map"]) == {"k499": 499}


def test_a_json_array_is_told_from_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}]')
    with pytest.raises(InputError, match=r"begins with '\['; expected one JSON object a line; convert it: jq"):
        open_source(DatasetConfig(str(tmp_path)))


def test_json_nested_deep(tmp_path: Path) -> None:
    deep: Any = "bottom"
    for _ in range(900):
        deep = [deep]
    (tmp_path / "a.jsonl").write_text('{"a": ' + json.dumps(deep) + ', "b": 1}\n{"a": "x", "b": 2}\n')
    assert [row["b"] for row in rows_of(tmp_path)] == [1, 2]


# CSV

CELLS = st.text(st.sampled_from('ab,"\n\r;é'), max_size=6)


@given(st.lists(st.tuples(CELLS, CELLS), max_size=30), st.integers(1, 7), st.integers(1, 40), st.booleans())
@settings(max_examples=150, deadline=None)
def test_csv_written_by_python_comes_back(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], chunk_rows: int, block: int, quote: bool
) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL if quote else csv.QUOTE_MINIMAL)
        writer.writerow(["first", "second"])
        writer.writerows(cells)
    before = runner.source.lines.BLOCK_BYTES
    runner.source.lines.BLOCK_BYTES = max(block, 20)
    try:
        found = rows_of(path, chunk_rows=chunk_rows)
    finally:
        runner.source.lines.BLOCK_BYTES = before
    assert [(row["first"] or "", row["second"] or "") for row in found] == cells


def test_csv_types_nulls_and_bad_records(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbfid;zip;score;ok;text\n1;01234;0.5;true;"a\nb"\n\n2;99999;;false;""\n3;1;2;true;5" pipe\n'
    )
    source = open_source(DatasetConfig(str(tmp_path)))
    assert [str(data_type) for data_type in source.schema.types] == ["int64", "string", "double", "bool", "string"]
    rows = rows_of(tmp_path)
    assert [(row["id"], row["zip"], row["score"], row["ok"], row["text"]) for row in rows] == [
        (1, "01234", 0.5, True, "a\nb"),
        (2, "99999", None, False, ""),
        (3, "1", 2.0, True, '5" pipe'),
    ]
    assert [row[ROW_COLUMN] for row in rows] == [0, 2, 3]
    bad = "".join(f"{i};1;1;true;x\n" for i in range(10_000)) + 'no;1;1;true;x\n1;2\n"1"x;1;1;true;y\n7;1;1;true;z\n'
    (tmp_path / "a.csv").write_text("id;zip;score;ok;text\n" + bad)
    rows = rows_of(tmp_path)[10_000:]
    assert rows[0]["text"] == "x" and rows[-1]["id"] == 7
    assert rows[0][ERROR_COLUMN] == "column id: found 'no'; expected int64"
    assert rows[1][ERROR_COLUMN] == "2 fields; expected 5"
    assert [row[ROW_COLUMN] for row in rows] == [10_000, 10_001, 10_002, 10_003]


def test_csv_with_invalid_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,ok\n2,\xff\xfe\n3,fine\n")
    rows = rows_of(tmp_path)
    assert [row["text"] for row in rows] == ["ok", None, "fine"]
    assert [bool(row[ERROR_COLUMN]) for row in rows] == [False, True, False]


@given(st.text(st.sampled_from('a,"\n\r'), max_size=60), st.integers(1, 9))
@settings(max_examples=500, deadline=None)
def test_scanner_does_not_depend_on_blocks(text: str, size: int) -> None:
    data = text.encode()
    whole = QuotedScanner(",").ends(data).tolist()
    scanner, found = QuotedScanner(","), []
    for begin in range(0, len(data), size):
        found += [begin + end for end in scanner.ends(data[begin : begin + size]).tolist()]
    assert found == whole


# Hugging Face


def test_data_set_by_name_is_streamed(weird_tmp_path: Path) -> None:
    for split, num_rows in (("train", 250), ("test", 10)):
        polars.DataFrame({"n": range(num_rows)}).write_parquet(weird_tmp_path / f"{split}.parquet")
    source = open_source(DatasetConfig(str(weird_tmp_path), format="huggingface", split="train", chunk_rows=100))
    chunks = list(source.chunks())
    assert [chunk.num_rows for chunk in chunks] == [100, 100, 50]
    for chunk in [chunks[2], chunks[0], chunks[1], chunks[0]]:
        assert source.read(chunk, ["n"]).column("n").to_pylist() == list(
            range(chunk.start, chunk.start + chunk.num_rows)
        )
    with pytest.raises(ConfigError, match=r"dataset.split: null; expected one of train, test"):
        open_source(DatasetConfig(str(weird_tmp_path), format="huggingface"))


def test_saved_splits(weird_tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    splits = {name: datasets.Dataset.from_dict({"n": [size] * size}) for name, size in (("train", 5), ("test", 2))}
    datasets.DatasetDict(splits).save_to_disk(str(weird_tmp_path / "saved"))
    assert [row["n"] for row in rows_of(weird_tmp_path / "saved", split="test")] == [2, 2]
    with pytest.raises(ConfigError, match=r"dataset.split"):
        open_source(DatasetConfig(str(weird_tmp_path / "saved")))


def test_unreachable_hub_is_an_input_error() -> None:
    code = """
from runner.config import DatasetConfig
from runner.errors import InputError
from runner.source import open_source
try:
    open_source(DatasetConfig("nobody/nothing", format="huggingface"))
except InputError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dataset.path: nobody/nothing: ") and "save it with save_to_disk" in done.stdout


def test_names_keep_the_prefix_of_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs/data").mkdir(parents=True)
    polars.DataFrame({"n": [1]}).write_parquet(tmp_path / "jobs/data/a.parquet")

    def resolve_path(path: str) -> str:
        return str(tmp_path / path.partition(":")[2])

    monkeypatch.setattr(runner.config, "resolve_path", resolve_path, raising=False)
    for path in ("project:jobs/data/*.parquet", "project:jobs/data", "project:jobs/data/a.parquet"):
        (chunk,) = open_source(DatasetConfig(path)).chunks()
        assert chunk.file == "project:jobs/data/a.parquet"
