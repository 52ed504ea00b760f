"""mode=verify finds each way in which an output can be wrong."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runner.chunk import FILE_COLUMN, ROW_COLUMN
from runner.config import DatasetConfig, OutputConfig
from runner.ledger import Ledger
from runner.sink import Sink
from runner.source import Source, open_source
from runner.verify import verify

SCHEMA = pa.schema(
    [
        (FILE_COLUMN, pa.string()),
        (ROW_COLUMN, pa.int64()),
        ("n", pa.int64()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
    ]
)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "data").mkdir()
    for name, num_rows in (("a", 250), ("b", 120)):
        pq.write_table(pa.table({"n": range(num_rows)}), tmp_path / f"data/{name}.parquet")
    return open_source(DatasetConfig(str(tmp_path / "data"), chunk_rows=100, filter="n != 7", limit=300))


def run(folder: str, source: Source, chunks: set[int] | None = None) -> Ledger:
    ledger, sink = Ledger.open(folder, {}), Sink(folder, SCHEMA, OutputConfig(), {})
    num_chunks = 0
    for chunk in source.chunks():
        num_chunks += 1
        if chunks is None or chunk.index in chunks:
            batch = source.read(chunk, ["n"])
            size = batch.num_rows
            columns = [pa.repeat(chunk.file, size), batch.column(ROW_COLUMN), batch.column("n")]
            nulls = [pa.nulls(size, pa.string())] * 2
            ledger.commit(sink.write(chunk, pa.table([*columns, *nulls], schema=SCHEMA), 0))
    ledger.finish(num_chunks, {})
    return ledger


def test_complete_and_half_done(tmp_path: Path, source: Source) -> None:
    run(str(tmp_path / "whole"), source)
    report = verify(str(tmp_path / "whole"), source)
    assert (report.exit_code, report.num_rows, report.num_parts, report.num_missing) == (0, 300, 4, 0), report.text()
    assert report.text().endswith("complete")
    run(str(tmp_path / "half"), source, {0, 2})
    report = verify(str(tmp_path / "half"), source)
    assert (report.exit_code, report.num_missing, report.num_problems) == (75, 2, 0), report.text()
    assert "2 chunks are not done" in report.text()


def rewrite(path: Path, table: pa.Table) -> None:
    """Put another table into a part and its entry, as only a defect of the runner could."""
    import orjson
    import xxhash

    pq.write_table(table, path)
    index = int(path.stem.removeprefix("part-"))
    for entry in path.parent.parent.joinpath("ledger").glob(f"{index:08d}.json"):
        record = orjson.loads(entry.read_bytes())
        record["checksum"] = xxhash.xxh3_128_hexdigest(path.read_bytes())
        entry.write_bytes(orjson.dumps(record))
    for rollup in path.parent.parent.joinpath("ledger").glob("rollup-*"):
        rollup.unlink()


@pytest.mark.parametrize("with_source", [True, False])
def test_bytes_that_changed(tmp_path: Path, source: Source, with_source: bool) -> None:
    run(str(tmp_path / "job"), source)
    part = tmp_path / "job/parts/part-00000001.parquet"
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    report = verify(str(tmp_path / "job"), source if with_source else None)
    assert report.exit_code == 4 and "part-00000001.parquet: its bytes are not those" in report.text()
    part.unlink()
    assert "part-00000001.parquet: missing" in verify(str(tmp_path / "job"), None).text()


def test_rows_missing_twice_or_foreign(tmp_path: Path, source: Source) -> None:
    run(str(tmp_path / "job"), source)
    part = tmp_path / "job/parts/part-00000000.parquet"
    table = pq.read_table(part)
    for wrong, message in (
        (table.slice(1), "1 rows missing (row 0 ...), 0 too many"),
        (pa.concat_tables([table, table.slice(3, 1)]), "1 twice"),
        (table.take(list(range(98, -1, -1))), "rows out of order"),
        (table.set_column(0, SCHEMA.field(0), pa.array(["other"] * 99)), "rows of other files"),
        (table.set_column(3, SCHEMA.field(3), pa.array(["bad"] * 99)), "99 rows with errors; expected 0"),
        (table.drop_columns(["n"]), "schema"),
    ):
        rewrite(part, wrong)
        report = verify(str(tmp_path / "job"), source)
        assert report.exit_code == 4 and message in report.text(), report.text()
    rewrite(part, table)
    assert verify(str(tmp_path / "job"), source).exit_code == 0


def test_strays_changed_input_and_surplus_parts(tmp_path: Path, source: Source) -> None:
    run(str(tmp_path / "job"), source)
    (tmp_path / "job/parts/extra.parquet").touch()
    assert "parts/extra.parquet: in no ledger entry" in verify(str(tmp_path / "job"), source).text()
    (tmp_path / "job/parts/extra.parquet").unlink()
    shorter = open_source(DatasetConfig(str(tmp_path / "data/a.parquet"), chunk_rows=100, filter="n != 7"))
    assert "expected none behind the end of the input" in verify(str(tmp_path / "job"), shorter).text()
    pq.write_table(pa.table({"n": range(249, -1, -1)}), tmp_path / "data/a.parquet")
    changed = open_source(DatasetConfig(str(tmp_path / "data"), chunk_rows=100, filter="n != 7", limit=300))
    report = verify(str(tmp_path / "job"), changed)
    assert report.exit_code == 4 and "a.parquet: its content has changed" in report.text()
