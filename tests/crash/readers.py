"""What people open an output folder with. Each gives the rows it sees, as (file, row) pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Rows = list[tuple[str, int]]


def duckdb(parts: Path) -> Rows:
    import duckdb

    return duckdb.sql(f"select _file, _row from '{parts}/*.parquet'").fetchall()


def polars(parts: Path) -> Rows:
    import polars

    return polars.scan_parquet(parts).select("_file", "_row").collect().rows()


def pandas(parts: Path) -> Rows:
    import pandas

    table = pandas.read_parquet(parts)
    return list(zip(table["_file"], table["_row"], strict=True))


def huggingface(parts: Path) -> Rows:
    import datasets

    files = [str(file) for file in sorted(parts.glob("*"))]
    table = datasets.Dataset.from_parquet(files, cache_dir=str(parts.parent.parent / "hf"))
    return list(zip(table["_file"], table["_row"], strict=True))


READERS: tuple[Callable[[Path], Rows], ...] = (duckdb, polars, pandas, huggingface)
