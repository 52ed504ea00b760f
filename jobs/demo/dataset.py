"""Writes the demo's dataset: held-out sentences in two Parquet files of several row groups.

    python -m jobs.demo.dataset                            # writes jobs/demo/data/sentences-*.parquet

Columns: id (string), sentence (string), kind (date, money, duration or time), expected (the value's normal form).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo.texts import Row, make_row

DATA_FOLDER = Path(__file__).parent / "data"
NUM_ROWS = 4000
NUM_FILES = 2
ROW_GROUP_ROWS = 500
SEED = 2024


def dataset_rows(num_rows: int = NUM_ROWS, seed: int = SEED) -> list[Row]:
    """Held-out rows, no sentence twice."""
    rng = Random(seed)
    rows: dict[str, Row] = {}
    while len(rows) < num_rows:
        row = make_row(rng, keep_held_out=True)
        rows.setdefault(row.text, row)
    return list(rows.values())


def dataset_table(rows: list[Row]) -> pa.Table:
    columns = {
        "id": [f"s{number:05}" for number in range(len(rows))],
        "sentence": [row.text for row in rows],
        "kind": [row.kind for row in rows],
        "expected": [row.expected for row in rows],
    }
    return pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA_FOLDER)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    table = dataset_table(dataset_rows())
    file_rows = NUM_ROWS // NUM_FILES
    for file in range(NUM_FILES):
        part = table.slice(file * file_rows, file_rows)
        path = out / f"sentences-{file}.parquet"
        pq.write_table(part, path, row_group_size=ROW_GROUP_ROWS, compression="zstd")
        print(f"{path}: {part.num_rows} rows, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
