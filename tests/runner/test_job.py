"""The job loop, with an engine that answers at once: what is in the output, and what is done again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines.api import ErrorInfo, Outcome, Request, SamplingParams
from runner import job as job_module
from runner import journal as journal_module
from runner.config import ShardConfig
from runner.errors import ConfigError, EngineError, InputError, InternalError, Interrupted, OutputError, TooManyErrors
from runner.job import run
from runner.source import open_source
from runner.tasks import generate
from runner.verify import verify
from tests.fake_engine import FakeEngine, output_ids
from tests.small_job import make_plan, read_output, write_rows

TEXTS = [f"row {i} of many" for i in range(650)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows", TEXTS[:350], TEXTS[350:])


def expected(texts: list[str]) -> list[str]:
    """What the fake engine's outputs decode to."""
    sampling = SamplingParams(max_tokens=8)
    spell = lambda ids: "".join(chr(33 + i) for i in ids)  # noqa: E731
    # The tokenizer's ids are those of the bytes, shifted: a printable ASCII character is its code - 33, a blank 220.
    encode = lambda text: [220 if char == " " else ord(char) - 33 for char in text]  # noqa: E731
    return [spell(output_ids(Request(0, "generate", encode(text), sampling))) for text in texts]


def fails_on(word: str) -> Any:
    """For FakeEngine: requests whose prompt begins with this character fail."""
    return lambda request: ErrorInfo("broken", "it broke") if request.token_ids[0] == ord(word) - 33 else None


def all_rows_once(folder: str, ids: list[int] | None = None) -> pa.Table:
    table = read_output(folder)
    assert table.column("id").to_pylist() == (list(range(len(TEXTS))) if ids is None else ids)
    return table


def test_rows_come_out_in_order_with_their_texts(tmp_path: Path, rows: Path) -> None:
    summary = run(make_plan(tmp_path), FakeEngine(per_step=37))
    table = all_rows_once(summary.folder)
    assert table.column_names == [
        *("_file", "_row", "id", "text_input", "text", "finish_reason", "num_prompt_tokens", "num_output_tokens"),
        *("input_truncated", "error_code", "error_message"),
    ]
    assert table.column("text_input").to_pylist() == TEXTS
    assert table.column("text").to_pylist() == expected(TEXTS)
    assert table.column("_row").to_pylist() == [*range(350), *range(300)]
    assert set(table.column("_file").to_pylist()) == {str(rows / "0.parquet"), str(rows / "1.parquet")}
    assert table.column("error_code").null_count == len(TEXTS)
    assert (summary.finished, summary.num_rows, summary.num_errors) == (True, 650, 0)
    assert summary.counts.num_prompt_tokens == sum(len(text) for text in TEXTS)
    out = tmp_path / "out" / "job"
    assert "'text' is in the output as 'text_input'" in (out / "run.log").read_text()
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["num_rows"] == 650
    assert json.loads((out / "plan.json").read_text())["output_folder"] == str(out)
    assert "chunk_rows: 100" in (out / "config.yaml").read_text()
    assert verify(str(out), None).exit_code == 0


@pytest.mark.parametrize("keep, columns", [([], []), (["id"], ["id"]), (["text"], ["id", "text_input"])])
def test_columns_that_are_kept(tmp_path: Path, rows: Path, keep: list[str], columns: list[str]) -> None:
    dataset = {"id_column": "id"} if keep == ["text"] else {}
    summary = run(make_plan(tmp_path, dataset=dataset, output={"keep_columns": keep}), FakeEngine())
    names = read_output(summary.folder).column_names
    assert names[2 : names.index("text")] == columns


def test_a_bad_row_is_an_error_of_its_row(tmp_path: Path) -> None:
    texts = ["good", None, "x" * 100, "!fails", "good"]
    write_rows(tmp_path / "rows", texts)
    summary = run(make_plan(tmp_path), FakeEngine(fail=fails_on("!")))
    table = read_output(summary.folder)
    assert table.column("error_code").to_pylist() == [None, "null_input", "too_long", "broken", None]
    assert table.column("error_message").to_pylist()[3] == "it broke"
    assert [text is None for text in table.column("text").to_pylist()] == [False, True, True, True, False]
    assert summary.counts.errors == {"null_input": 1, "too_long": 1, "broken": 1}
    assert (summary.finished, summary.num_rows, summary.num_errors) == (True, 5, 3)


def test_an_empty_input_gives_a_schema(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", [])
    engine = FakeEngine()
    summary = run(make_plan(tmp_path), engine)
    table = read_output(summary.folder)
    assert summary.finished and table.num_rows == 0 and "text" in table.column_names and engine.num_requests == 0


def test_samples_are_lists_in_order(tmp_path: Path, rows: Path) -> None:
    sampling = SamplingParams(max_tokens=8, temperature=1.0)
    summary = run(make_plan(tmp_path, samples=3, sampling=sampling), FakeEngine(per_step=31))
    texts = all_rows_once(summary.folder).column("text").to_pylist()
    assert all(len(samples) == 3 for samples in texts)
    again = run(make_plan(tmp_path, samples=3, sampling=sampling, name="again", window_rows=10), FakeEngine())
    assert read_output(again.folder).column("text").to_pylist() == texts


@pytest.mark.parametrize("window, chunk_rows", [(1, 100), (3, 7), (10_000, 10_000)])
def test_neither_window_nor_chunks_change_a_row(tmp_path: Path, rows: Path, window: int, chunk_rows: int) -> None:
    plan = make_plan(tmp_path, window_rows=window, dataset={"chunk_rows": chunk_rows, "limit": 200})
    table = all_rows_once(run(plan, FakeEngine(per_step=5)).folder, list(range(200)))
    assert table.column("text").to_pylist() == expected(TEXTS[:200])


def test_filter_and_limit(tmp_path: Path, rows: Path) -> None:
    plan = make_plan(tmp_path, dataset={"filter": "id >= 340", "limit": 20})
    all_rows_once(run(plan, FakeEngine()).folder, list(range(340, 360)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"task": generate.Config("generate", prompt="{{ txt }}")},
            r"task generate: column 'txt' .* did you mean 'text'",
        ),
        ({"output": {"keep_columns": ["idd"]}}, "output.keep_columns: column 'idd'"),
        ({"dataset": {"id_column": "nope"}}, "dataset.id_column: column 'nope'"),
        ({"sampling_columns": {"temperature": "heat"}}, "column 'heat'"),
    ],
)
def test_a_missing_column_is_said_before_anything_is_made(
    tmp_path: Path, rows: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(make_plan(tmp_path, **changes), FakeEngine())
    assert not (tmp_path / "out").exists()


def test_an_input_without_columns_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "night.jsonl").touch()
    with pytest.raises(InputError, match=r"dataset\.path: .*rows: empty, so without columns; expected text; check"):
        run(make_plan(tmp_path), FakeEngine())


def test_a_part_says_what_made_it(tmp_path: Path, rows: Path) -> None:
    folder = Path(run(make_plan(tmp_path), FakeEngine()).folder)
    for part in (folder / "parts").iterdir():
        said = {key.decode(): value.decode() for key, value in pq.read_metadata(part).metadata.items()}
        assert said["job"] == "job"
        assert json.loads(said["fingerprint"]) == json.loads((folder / "fingerprint.json").read_text())["fingerprint"]
        assert json.loads(said["plan"]).items() >= {("engine", "cpu"), ("dtype", "float32")}
        assert json.loads(said["versions"])["torch"] == metadata.version("torch")


def test_the_folder_of_another_job_is_refused_or_left_alone(tmp_path: Path, rows: Path) -> None:
    first = run(make_plan(tmp_path), FakeEngine())
    other = generate.Config("generate", prompt="Say {{ text }}")
    with pytest.raises(OutputError, match="holds another job; expected the same task"):
        run(make_plan(tmp_path, task=other), FakeEngine())
    second = run(make_plan(tmp_path, task=other, on_change="new"), FakeEngine())
    assert second.folder == f"{first.folder}-2" and (tmp_path / "out" / "job-2" / "plan.json").exists()


def test_chunks_whose_entries_a_person_has_removed_are_done_again(tmp_path: Path, rows: Path) -> None:
    folder = Path(run(make_plan(tmp_path), FakeEngine()).folder)
    before = read_output(folder)
    (folder / "parts" / "part-00000002.parquet").unlink()
    with pytest.raises(OutputError, match=r"is missing; .* or remove ledger/00000002\*\.json to have them done again"):
        run(make_plan(tmp_path), FakeEngine())
    (folder / "ledger" / "00000002.json").unlink()
    assert verify(str(folder), open_source(make_plan(tmp_path).job.dataset)).exit_code == 75
    again = run(make_plan(tmp_path), FakeEngine())
    assert again.counts.num_rows == 100 and again.finished and read_output(folder).equals(before)


def test_a_finished_job_does_nothing(tmp_path: Path, rows: Path, capsys: Any, monkeypatch: Any) -> None:
    run(make_plan(tmp_path), FakeEngine())
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.parquet")}
    monkeypatch.setattr(job_module, "open_engine", lambda *args: pytest.fail("an engine was asked for"))
    summary = run(make_plan(tmp_path))
    assert summary.finished and summary.counts.num_rows == 0 and summary.num_rows == 650
    assert "finished already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.parquet")} == before


CHANGED = {
    "content": ([["a", "b"], ["other"]], r"1\.parquet: its content has changed", 3),
    "gone": ([["a", "b"]], r"1\.parquet: is no longer part", 2),
    "new": ([["a", "b"], ["c", "d"], ["e"]], r"2\.parquet: is a new file", 5),
}


@pytest.mark.parametrize(("files", "message", "num_rows"), CHANGED.values(), ids=CHANGED)
def test_another_input_is_another_job_also_when_the_first_is_finished(
    tmp_path: Path, files: list[list[str]], message: str, num_rows: int
) -> None:
    write_rows(tmp_path / "rows", ["a", "b"], ["c", "d"])
    first = run(make_plan(tmp_path), FakeEngine())
    (tmp_path / "rows" / "1.parquet").unlink()
    write_rows(tmp_path / "rows", *files)
    with pytest.raises(InputError, match=message):
        run(make_plan(tmp_path), FakeEngine())
    for _ in range(2):
        second = run(make_plan(tmp_path, on_change="new"), FakeEngine())
        assert (second.folder, second.num_rows) == (f"{first.folder}-2", num_rows)


def test_new_files_behind_the_limit_or_without_rows_change_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", ["a", "b"])
    limited = {"name": "limited", "dataset": {"limit": 2}}
    run(make_plan(tmp_path), FakeEngine())
    run(make_plan(tmp_path, **limited), FakeEngine())
    write_rows(tmp_path / "rows", ["a", "b"], [])
    assert run(make_plan(tmp_path), FakeEngine()).counts.num_rows == 0
    write_rows(tmp_path / "rows", ["a", "b"], [], ["c"])
    assert run(make_plan(tmp_path, **limited), FakeEngine()).counts.num_rows == 0


def test_a_log_that_cannot_be_written_is_a_message_and_no_matter_once_all_is_done(tmp_path: Path, rows: Path) -> None:
    (tmp_path / "out" / "job" / "run.log").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"run\.log: Is a directory; expected a folder that can be written"):
        run(make_plan(tmp_path), FakeEngine())
    (tmp_path / "out" / "job" / "run.log").rmdir()
    run(make_plan(tmp_path), FakeEngine())
    (tmp_path / "out" / "job" / "run.log").unlink()
    (tmp_path / "out" / "job" / "run.log").mkdir()
    assert run(make_plan(tmp_path)).finished


def test_retry_does_the_failed_rows_again_and_no_others(tmp_path: Path) -> None:
    texts = [f"!{i}" if i % 50 == 0 else f"row {i}" for i in range(350)]
    texts[200:300] = ["fine"] * 100
    write_rows(tmp_path / "rows", texts)
    first = run(make_plan(tmp_path), FakeEngine(fail=fails_on("!")))
    assert first.num_errors == 5
    good = read_output(first.folder)
    engine = FakeEngine()
    second = run(make_plan(tmp_path, retry_errors=True), engine)
    assert (engine.num_requests, second.num_errors, second.finished) == (5, 0, True)
    table = all_rows_once(second.folder, list(range(350)))
    assert table.column("text").to_pylist() == expected(texts)
    kept = [i for i in range(350) if good.column("error_code")[i].as_py() is None]
    assert table.take(kept).equals(good.take(kept))
    assert verify(second.folder, None).exit_code == 0
    again = FakeEngine()
    run(make_plan(tmp_path, retry_errors=True), again)
    assert again.num_requests == 0


def test_an_interrupted_retry_goes_on(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", [f"!{i}" if i % 2 else "fine" for i in range(60)])
    plan = make_plan(tmp_path, max_error_rate=1.0, window_rows=8)
    assert run(plan, FakeEngine(fail=fails_on("!"))).num_errors == 30
    retry = replace(plan, job=replace(plan.job, retry_errors=True))
    with pytest.raises(EngineError):
        run(retry, FakeEngine(per_step=2, crash_at=6))
    engine = FakeEngine()
    summary = run(retry, engine)
    assert engine.num_requests == 30 - 12 and summary.num_errors == 0
    all_rows_once(summary.folder, list(range(60)))


def test_retry_takes_in_the_rows_of_a_job_that_was_stopped(tmp_path: Path) -> None:
    """A device that is broken fails every row; once it is repaired, those rows are as good as new."""
    write_rows(tmp_path / "rows", [f"!{i}" for i in range(450)])
    with pytest.raises(TooManyErrors):
        run(make_plan(tmp_path), FakeEngine(per_step=30, fail=fails_on("!")))
    summary = run(make_plan(tmp_path, retry_errors=True), FakeEngine())
    assert (summary.num_rows, summary.num_errors, summary.finished) == (450, 0, True)
    assert read_output(summary.folder).column("id").to_pylist() == list(range(450))


def test_shards_make_one_output(tmp_path: Path, rows: Path) -> None:
    whole = run(make_plan(tmp_path, name="whole"), FakeEngine())
    finished = []
    for index in (2, 0, 1):
        summary = run(make_plan(tmp_path, shard=ShardConfig(index, 3)), FakeEngine(per_step=50))
        finished.append(summary.finished)
    assert finished == [False, False, True]
    assert read_output(summary.folder).equals(read_output(whole.folder))
    again = FakeEngine()
    assert run(make_plan(tmp_path, shard=ShardConfig(1, 3)), again).finished and again.num_requests == 0


def test_two_processes_on_one_shard_are_told_once(tmp_path: Path, rows: Path, capsys: Any) -> None:
    other = FakeEngine()
    engine, steps = FakeEngine(per_step=100), iter(range(100))
    engine.on_step = lambda: run(make_plan(tmp_path), other) if next(steps) == 0 else None
    summary = run(make_plan(tmp_path), engine)
    assert engine.num_requests == other.num_requests == len(TEXTS)
    all_rows_once(summary.folder)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("shard 0 of 1: ")]
    assert len(said) == 1 and "has committed chunk" in said[0] and "shard.sharing=leases" in said[0]


def test_a_process_at_work_on_the_same_shard_is_known_at_the_start(tmp_path: Path, rows: Path, capsys: Any) -> None:
    """By its journal; not those of other shards, of processes that have ended, or of other machines."""
    here, alive = journal_module._process_name().rpartition("-")[0], os.getppid()
    out = tmp_path / "out" / "job"
    names = {f"shard1-{here}-{alive}": 0, f"shard0-{here}-{2**22 + 1}": 0, f"shard0-elsewhere-1-{alive}": 0}
    for name, count in {**names, f"shard0-{here}-{alive}": 1}.items():
        (out / "journal").mkdir(parents=True, exist_ok=True)
        (out / "journal" / f"{name}-0a0a0a0a-0.journal").touch()
        run(make_plan(tmp_path, shard=ShardConfig(0, 2)), FakeEngine())
        said = capsys.readouterr().err
        assert said.count(f"shard 0 of 2: process {alive} of this machine works on it too; expected one") == count
        shutil.rmtree(out / "ledger")
        shutil.rmtree(out / "parts")


def test_too_many_errors_stop_the_job(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", [f"!{i}" if i % 3 else "fine" for i in range(2000)])
    engine = FakeEngine(per_step=10, fail=fails_on("!"))
    with pytest.raises(
        TooManyErrors,
        match=r"max_error_rate: .* with broken: it broke; .* raise the limit to go on \(retry_errors=true",
    ):
        run(make_plan(tmp_path), engine)
    assert engine.num_requests < 500
    resumed = FakeEngine(fail=fails_on("!"))
    summary = run(make_plan(tmp_path, max_error_rate=0.7), resumed)
    assert summary.num_rows == 2000 and resumed.num_requests < 2000
    all_rows_once(summary.folder, list(range(2000)))


def test_errors_in_a_row_stop_the_job(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", [None if 300 <= i < 350 else "fine" for i in range(1000)])
    with pytest.raises(TooManyErrors, match="max_consecutive_errors: 50 rows one after the other"):
        run(make_plan(tmp_path, max_consecutive_errors=50), FakeEngine())
    assert run(make_plan(tmp_path, max_consecutive_errors=51), FakeEngine()).num_errors == 50


def test_refused_rows_ahead_of_the_engine_are_no_reason_to_stop(tmp_path: Path) -> None:
    """A third of the rows becomes no request: they are counted before any other row comes back."""
    write_rows(tmp_path / "rows", [None if i % 3 == 0 else "fine" for i in range(900)])
    plan = make_plan(tmp_path, window_rows=600, max_consecutive_errors=20)
    assert run(plan, FakeEngine(per_step=1)).num_errors == 300


def test_an_engine_that_breaks_loses_no_finished_row(tmp_path: Path, rows: Path) -> None:
    plan = make_plan(tmp_path, output={"journal_interval_s": 1000.0})
    with pytest.raises(EngineError, match=r"RuntimeError: the device is gone; .* run the same command again"):
        run(plan, FakeEngine(per_step=10, crash_at=7))
    engine = FakeEngine()
    summary = run(plan, engine)
    assert engine.num_requests == 650 - 70 and not engine.closed
    assert all_rows_once(summary.folder).column("text").to_pylist() == expected(TEXTS)


class Forgetful(FakeEngine):
    """Loses a request."""

    def step(self) -> list[Outcome]:
        return super().step()[1:]


class Chatty(FakeEngine):
    """Answers twice."""

    def step(self) -> list[Outcome]:
        return super().step() * 2


def test_an_engine_that_does_not_keep_its_word_is_found_out(tmp_path: Path, rows: Path) -> None:
    with pytest.raises(EngineError, match="have no outcome"):
        run(make_plan(tmp_path), Forgetful())
    with pytest.raises(InternalError, match="nobody waits for"):
        run(make_plan(tmp_path, name="other"), Chatty())


def test_the_time_that_a_job_may_take(tmp_path: Path, rows: Path) -> None:
    plan = make_plan(tmp_path, max_runtime_s=0.5)
    with pytest.raises(Interrupted, match=r"max_runtime_s: 0.5 s are over") as caught:
        run(plan, FakeEngine(per_step=5, step_s=0.02))
    assert caught.value.signal is None
    engine = FakeEngine()
    run(make_plan(tmp_path), engine)
    assert 0 < engine.num_requests < 650


def test_a_result_file_in_the_format_of_openai_batches(tmp_path: Path, rows: Path) -> None:
    summary = run(make_plan(tmp_path, output={"format": "openai_batch"}), FakeEngine())
    lines = (Path(summary.folder) / "batch_output.jsonl").read_text().splitlines()
    bodies = [json.loads(line)["response"]["body"] for line in lines]
    assert [body["choices"][0]["message"]["content"] for body in bodies] == expected(TEXTS)


def test_the_result_file_of_a_finished_job_is_made_when_it_is_missing(tmp_path: Path, rows: Path) -> None:
    summary = run(make_plan(tmp_path), FakeEngine())
    engine = FakeEngine()
    run(make_plan(tmp_path, output={"format": "openai_batch"}), engine)
    assert engine.num_requests == 0
    assert len((Path(summary.folder) / "batch_output.jsonl").read_text().splitlines()) == 650


class Stubborn(FakeEngine):
    """Keeps the first request until nothing else is left."""

    def step(self) -> list[Outcome]:
        first, self._queue = self._queue[:1], self._queue[1:]
        outcomes = super().step() if self._queue else [self._outcome(request) for request in first]
        if outcomes and first and outcomes[0].request_id != first[0].request_id:
            self._queue = first + self._queue
        return outcomes


def test_a_row_that_takes_long_does_not_let_memory_grow(tmp_path: Path, monkeypatch: Any) -> None:
    """Chunks that are complete but for one row wait in memory: no more of them than there is room for."""
    write_rows(tmp_path / "rows", [f"row {i}" for i in range(5000)])
    most = []
    take = job_module.JobRunner._take

    def watch(self: Any, outcomes: Any) -> None:
        take(self, outcomes)
        most.append(self._num_held)

    monkeypatch.setattr(job_module.JobRunner, "_take", watch)
    plan = make_plan(tmp_path, window_rows=20, dataset={"chunk_rows": 1000})
    summary = run(plan, Stubborn(per_step=10))
    assert read_output(summary.folder).column("id").to_pylist() == list(range(5000))
    assert 2000 <= max(most) <= 4 * 20 + 5 * 1000


def test_rows_of_a_part_that_cannot_be_written_are_journaled(tmp_path: Path, rows: Path, monkeypatch: Any) -> None:
    def full(self: Any, *args: Any) -> None:
        raise OutputError("out: no space left on the device")

    with monkeypatch.context() as patch:
        patch.setattr(job_module.Sink, "write", full)
        with pytest.raises(OutputError, match="no space"):
            run(make_plan(tmp_path, output={"journal_interval_s": 1000.0}), FakeEngine(per_step=100))
    engine = FakeEngine()
    run(make_plan(tmp_path), engine)
    assert engine.num_requests <= 650 - 100
