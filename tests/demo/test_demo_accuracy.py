"""The demo's model is as good as its README says, on values that it has never seen."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from jobs.demo.dataset import DATA_FOLDER, NUM_ROWS, ROW_GROUP_ROWS, dataset_rows
from jobs.demo.texts import KINDS, held_out
from jobs.demo.train import MODEL_FOLDER, answers
from tests.conftest import ROOT
from tests.demo.running import parts, run_job

PROMISED_ACCURACY = 0.99


def test_dataset_is_what_the_script_makes() -> None:
    files = sorted(DATA_FOLDER.glob("*.parquet"))
    assert len(files) == 2
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert [(row["sentence"], row["kind"], row["expected"]) for row in rows] == [
        (row.text, row.kind, row.expected) for row in dataset_rows()
    ]
    assert len({row["id"] for row in rows}) == NUM_ROWS
    assert all(held_out(row["expected"]) for row in rows)
    metadata = pq.read_metadata(files[0])
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [ROW_GROUP_ROWS] * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accuracy_by_transformers(dtype: str) -> None:
    """On every eighth row; the whole dataset goes through the job in another test."""
    rows = dataset_rows()[::8]
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=dtype)
    found = answers(model, PreTrainedTokenizerFast.from_pretrained(MODEL_FOLDER), [row.text for row in rows])
    wrong = [
        f"{row.text!r}: {answer!r}, expected {row.expected!r}"
        for row, answer in zip(rows, found, strict=True)
        if answer != row.expected
    ]
    assert len(wrong) <= (1 - PROMISED_ACCURACY) * len(rows), "\n".join(wrong)


def test_accuracy_by_the_job(tmp_path: Path) -> None:
    """The whole dataset through `python -m runner`, which is what `make run` runs."""
    run_job(tmp_path)
    found = parts(tmp_path, "demo")
    assert found.column("id").to_pylist() == [f"s{number:05}" for number in range(NUM_ROWS)]
    assert found.column("error_code").null_count == NUM_ROWS
    assert set(found.column("finish_reason").to_pylist()) == {"stop"}
    answered, expected, kinds = (found.column(name).to_pylist() for name in ("text", "expected", "kind"))
    right = Counter(kind for text, want, kind in zip(answered, expected, kinds, strict=True) if text == want)
    accuracy = {kind: right[kind] / count for kind, count in Counter(kinds).items()}
    assert set(accuracy) == set(KINDS)
    assert right.total() / NUM_ROWS >= PROMISED_ACCURACY, accuracy
    assert "input: all done" in run_job(tmp_path, "mode=verify")


def test_sizes_in_the_repository() -> None:
    assert sum(path.stat().st_size for path in MODEL_FOLDER.iterdir()) < 6e6
    assert sum(path.stat().st_size for path in DATA_FOLDER.iterdir()) < 1e6
    assert (ROOT / "jobs/demo/README.md").is_file()
