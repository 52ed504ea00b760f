"""The look at the input: counts, a sample through the task, and the mistakes that it finds before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines.api import Kind, Outcome, Request, SamplingParams
from engines.checkpoint import Checkpoint
from runner import inspect as inspection
from runner.config import DatasetConfig, JobConfig, OutputConfig
from runner.errors import ConfigError, RowError
from runner.plan import Plan, resolve
from tests.runner.planning import CPU, H200, checkpoint, planning


class Words:
    """A tokenizer of words, for tests: the id of a word is its length."""

    def decode_whole(self, ids: Any) -> str:
        return " ".join("x" * token for token in ids)


@dataclass
class WordTask:
    """A task over the column `text`: fails on rows that say so and on rows of more words than fit."""

    length: int
    sampling: SamplingParams
    kind: Kind = "generate"
    columns = ("text",)
    schema = pa.schema([("output", pa.string())])

    def requests(self, batch: pa.RecordBatch, file: str, first_id: int) -> list[Any]:
        rows = []
        for text in batch.column("text").to_pylist():
            words = text.split()
            if words[0] == "fail":
                rows.append(RowError("template", f"{text!r} has no name"))
            elif len(words) >= self.length:
                rows.append(RowError("too_long", f"{len(words)} tokens; expected fewer than {self.length}"))
            else:
                rows.append([Request(first_id, self.kind, [len(word) for word in words], self.sampling)])
        return rows

    def outputs(self, results: Any) -> pa.RecordBatch:
        raise AssertionError("a plan computes nothing", Outcome)


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function from rows and changes of the job to what `inspect` finds."""

    def build(asked: JobConfig, opened: Checkpoint, tokenizer: Any, max_model_len: int) -> WordTask:
        return WordTask(max_model_len, asked.sampling)

    monkeypatch.setattr(inspection, "build_task", build)
    monkeypatch.setattr(inspection, "load_tokenizer", lambda path: Words())

    def look(rows: list[str], host: Any = CPU, **changes: Any) -> tuple[Plan, inspection.Inspection]:
        folder = tmp_path / "rows"
        folder.mkdir(exist_ok=True)
        half = len(rows) // 2
        for name, part in (("a", rows[:half]), ("b", rows[half:])):
            pq.write_table(pa.table({"text": pa.array(part, pa.string())}), folder / f"{name}.parquet")
        dataset = changes.pop("dataset", DatasetConfig(str(folder), chunk_rows=500))
        asked = planning(host, dataset=replace(dataset, path=str(folder)), **changes)
        plan = resolve(asked, checkpoint(), host, "generate")
        found = inspection.inspect(plan, checkpoint())
        return replace(plan, inspection=found), found

    return look


ROWS = [" ".join(["ab"] * (1 + i % 10)) for i in range(3000)]


def test_counts_and_a_sample(looked_at: Any) -> None:
    plan, found = looked_at(ROWS)
    assert (found.num_files, found.num_chunks, found.num_rows) == (2, 6, 3000)
    assert found.expected_rows == 3000 and found.sampled_rows == 256
    assert set(found.prompt_lengths) == set(range(1, 11))
    assert found.prompt_tokens == pytest.approx(3000 * 5.5, rel=0.05)
    assert found.max_output_tokens == 3000 * 256
    assert found.examples == ("xx", "xx xx")
    text = plan.text()
    assert "rows      3,000 rows in 2 files, 6 chunks" in text
    assert "  | xx xx" in text.splitlines()


def test_rows_that_do_not_fit_are_counted(looked_at: Any) -> None:
    rows = ["ab " * 9000 if i % 4 == 0 else "ab" for i in range(400)]
    _, found = looked_at(rows)
    (problem,) = found.problems
    assert (problem.code, problem.num_rows) == ("too_long", found.sampled_rows // 4)
    assert problem.example == "9000 tokens; expected fewer than 8192"
    assert f"{problem.num_rows} rows (25%) end as too_long: 9000 tokens" in found.text()


def test_a_task_that_fails_on_every_row_stops_here(looked_at: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"task generate: fails on all of 10 sampled rows, .* template: 'fail' has no"
    ):
        looked_at(["fail"] * 10)


def test_filter_and_limit_shrink_the_estimate(looked_at: Any) -> None:
    rows = ["ab cd" if i % 2 else "ab" for i in range(3000)]
    _, found = looked_at(rows, dataset=DatasetConfig("", filter="text == 'ab'", chunk_rows=500))
    assert (found.num_rows, found.expected_rows) == (3000, 1500)
    assert "about 1,500 after filter and limit" in found.text()
    _, found = looked_at(rows, dataset=DatasetConfig("", limit=70, chunk_rows=500))
    assert found.expected_rows == 70


def test_no_rows(looked_at: Any) -> None:
    _, found = looked_at([])
    assert found.num_rows == 0 and "there is nothing to do" in found.text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": DatasetConfig("", id_column="txet")}, "dataset.id_column: column 'txet' .* did you mean 'text'?"),
        ({"sampling_columns": {"top_k": "k"}}, "sampling.columns.top_k: column 'k' is not in the dataset"),
        ({"output": OutputConfig(keep_columns=["url"])}, "output.keep_columns: column 'url' .*expected one of text"),
    ],
)
def test_columns_that_are_not_there(looked_at: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        looked_at(ROWS, **changes)


def test_time_and_cost_on_a_described_host(looked_at: Any) -> None:
    _, found = looked_at(ROWS, host=H200)
    (estimate,) = found.estimates
    assert estimate.device == "NVIDIA H200"
    # 768,000 tokens, each of at least 2 x 8 G operations at 989 T/s.
    assert 1 < estimate.prefill_s + estimate.decode_s < 600
    assert estimate.cost == pytest.approx((estimate.prefill_s + estimate.decode_s) / 3600 * 4.0)
    assert "cost" in found.text()


def test_max_tokens_null_means_the_rest_of_the_context(looked_at: Any) -> None:
    _, found = looked_at(["ab"] * 10, sampling=SamplingParams(max_tokens=None))
    assert found.max_output_tokens == 10 * (8192 - 1)


def test_time_on_this_machine_is_from_measured_rates(looked_at: Any) -> None:
    _, found = looked_at(ROWS[:20])
    (estimate,) = found.estimates
    assert estimate.prefill_s > 0 and estimate.decode_s > 0 and estimate.cost is None


@pytest.mark.parametrize(
    ("lengths", "lines"),
    [
        ([], ["(none)"]),
        ([5], ["5 to 5      1  " + "#" * 40]),
        ([1, 2, 2], ["1 to 1      1  " + "#" * 20, "2 to 2      2  " + "#" * 40]),
    ],
)
def test_histogram(lengths: list[int], lines: list[str]) -> None:
    assert inspection.histogram(lengths) == lines


def test_a_histogram_covers_every_length_once() -> None:
    lengths = [3, 900, 17, 44, 44, 512, 100, 101]
    lines = inspection.histogram(lengths)
    assert len(lines) <= inspection.NUM_BINS
    assert sum(int(line.split()[3]) for line in lines) == len(lengths)
    assert int(lines[0].split()[0]) == 3 and int(lines[-1].split()[2]) == 900
