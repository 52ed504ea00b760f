"""What a run shows and leaves behind."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engines.api import EngineStats
from runner import progress as progress_module
from runner.progress import Counts, Progress, Summary, duration

STATS = EngineStats(5, 3, 25, 100, 7, 1, 0, 0, 0)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (0.00123, "0.0012 s"),
        (9.96, "10 s"),
        (42.4, "42 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (18_600, "5 h 10 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_and_metrics(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    progress = Progress(tmp_path, "shard 3", total_rows=100)
    progress.start()
    counts = Counts(num_rows=20, num_prompt_tokens=400, num_output_tokens=40, errors=Counter(too_long=2))
    progress.update(counts, 20, STATS)
    line = "20 rows, 20%, about 1 min 20 s left, 2 errors, 1.0 rows/s, tokens/s 20 in 2 out, KV 75%"
    assert capsys.readouterr().err == f"shard 3: {line}\n"
    progress.stop(counts, 20, None)
    progress.say("the end, with s3://key:s3cr3t@bucket")
    progress.close()
    log = (tmp_path / "run.log").read_text().splitlines()
    assert len(log) == 2 and log[0].endswith(f"shard 3: {line}") and "s3cr3t" not in log[1]
    first, last = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (first["num_rows"], first["rows_per_s"], first["kv_used_fraction"], first["num_errors"]) == (20, 1, 0.75, 2)
    assert last["rows_per_s"] == 0 and "kv_used_fraction" not in last


def test_a_process_without_a_standard_error_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    progress = Progress(tmp_path)
    progress.start()
    progress.say("a line")
    progress.close()
    assert "a line" in (tmp_path / "run.log").read_text()


def test_a_bar_on_a_terminal(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress_module, "BAR_INTERVAL_S", 0.0)
    progress = Progress(tmp_path, total_rows=100)
    progress.start()
    progress.update(Counts(num_rows=50), 50, STATS)
    progress.say("a line [not markup]")
    progress.stop(Counts(num_rows=50), 50, STATS)
    progress.close()
    shown = capsys.readouterr().err
    assert "50 rows" in shown and "a line [not markup]" in shown
    assert "a line [not markup]" in (tmp_path / "run.log").read_text()


def test_summary() -> None:
    counts = Counts(10, 100, 20, 30, Counter({"too_long": 3, "null_input": 1}))
    text = Summary("outputs/x", True, 1000, 7, 2.0, counts).text()
    assert text.splitlines() == [
        "rows      1,000 committed",
        "this run  10 rows in 2 s, 5 rows/s",
        "tokens    100 in (20 of them reused), 30 out",
        "errors    7 rows",
        "          3 too_long in this run",
        "          1 null_input in this run",
        "folder    outputs/x",
    ]
