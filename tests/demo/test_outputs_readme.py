"""Each recipe of outputs/README.md does what it says, on a folder as a job leaves it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from runner.chunk import FILE_COLUMN, ROW_COLUMN
from runner.config import DatasetConfig, OutputConfig
from runner.ledger import Ledger
from runner.sink import Sink
from runner.source import open_source
from tests.conftest import ROOT

README = (ROOT / "outputs" / "README.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^### (\w+):.*?\n```python\n(.*?)```", README, flags=re.MULTILINE | re.DOTALL))
NUM_FAILED = 3
NUM_WRONG = 40


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's dataset and its output, in which the first rows failed and the next ones are wrong."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    source = open_source(DatasetConfig(path=str(ROOT / "jobs/demo/data/*.parquet"), chunk_rows=1000))
    string = pa.string()
    own = [("text", string), ("error_code", string), ("error_message", string)]
    schema = pa.schema([(FILE_COLUMN, string), (ROW_COLUMN, pa.int64()), *source.schema, *(pa.field(*f) for f in own)])
    ledger = Ledger.open(str(folder / "outputs" / "demo"), {"model": "demo"})
    sink = Sink(ledger.folder, schema, OutputConfig(), {"model": "demo"})
    for chunk in source.chunks():
        rows = source.read(chunk, None).to_pylist()
        failed = NUM_FAILED if chunk.index == 0 else 0
        for i, row in enumerate(rows):
            bad = i < failed
            row[FILE_COLUMN] = chunk.file
            row["text"] = None if bad else "?" if chunk.index == 0 and i < failed + NUM_WRONG else row["expected"]
            row["error_code"], row["error_message"] = ("prompt_too_long", "600 tokens") if bad else (None, None)
        ledger.commit(sink.write(chunk, pa.Table.from_pylist(rows, schema), failed))
    return folder


def run(recipe: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(checkout)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", checkout / "cache")
    names: dict[str, Any] = {}
    exec(compile(RECIPES[recipe], f"outputs/README.md, {recipe}", "exec"), names)
    return names


def test_all_recipes_are_tested() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert RECIPES
    assert {name.lower() for name in RECIPES} <= tested


def test_duckdb(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run("DuckDB", checkout, monkeypatch)["accuracy"].fetchall()
    assert [kind for kind, _, _ in rows] == ["date", "duration", "money", "time"]
    assert sum(count for _, count, _ in rows) == 4000
    # avg leaves out the failed rows, whose text is null.
    assert all(0.9 < accuracy <= 1 for _, _, accuracy in rows)
    assert any(accuracy < 1 for _, _, accuracy in rows)


def test_polars(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = run("Polars", checkout, monkeypatch)["reasons"]
    assert reasons.to_dicts() == [
        {"error_code": "prompt_too_long", "num_rows": NUM_FAILED, "error_message": "600 tokens"}
    ]


def test_pandas(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = run("pandas", checkout, monkeypatch)["table"]
    assert len(table) == 4000
    assert int((table["text"] == table["expected"]).sum()) == 4000 - NUM_FAILED - NUM_WRONG


def test_datasets(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = run("datasets", checkout, monkeypatch)["answers"]
    assert answers.column_names == ["id", "text"]
    assert len(answers) == 4000 - NUM_FAILED


def test_pyarrow(checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("PyArrow", checkout, monkeypatch)
    shown = capsys.readouterr().out
    assert "model demo" in shown
    assert '"index":0' in shown
