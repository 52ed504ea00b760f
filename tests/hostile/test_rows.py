"""Rows of any kind: a result or an error of the row, and no control token that the data spelled."""

from __future__ import annotations

import datetime
import decimal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.api import Outcome, Request
from runner.job import run
from runner.prompt import MAX_PROMPT_CHARS, load_tokenizer
from runner.tasks import chat, generate
from tests.conftest import ROOT
from tests.fake_engine import FakeEngine
from tests.small_job import make_plan, read_output

DEMO = ROOT / "jobs" / "demo" / "model"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SCALAR = {
    pa.string(): TEXT,
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.floats(),
    pa.bool_(): st.booleans(),
    pa.binary(): st.binary(max_size=20),
    pa.date32(): st.dates(),
    pa.timestamp("us", "UTC"): st.datetimes(
        datetime.datetime(1700, 1, 1), datetime.datetime(2200, 1, 1), timezones=st.just(datetime.timezone.utc)
    ),
    pa.duration("ms"): st.timedeltas(datetime.timedelta(-1000), datetime.timedelta(1000)),
    pa.decimal128(20, 4): st.decimals(-(10**9), 10**9, places=4, allow_nan=False).map(decimal.Decimal),
    pa.null(): st.none(),
}


def typed() -> st.SearchStrategy[tuple[pa.DataType, st.SearchStrategy[Any]]]:
    """(type, its values), nested up to two deep"""
    scalar = st.sampled_from(list(SCALAR.items()))
    return st.recursive(
        scalar,
        lambda inner: (
            inner.map(lambda one: (pa.list_(one[0]), st.lists(st.none() | one[1], max_size=3)))
            | st.tuples(inner, inner).map(
                lambda two: (
                    pa.struct([("role", two[0][0]), ("content", two[1][0])]),
                    st.fixed_dictionaries({"role": st.none() | two[0][1], "content": st.none() | two[1][1]}),
                )
            )
        ),
        max_leaves=3,
    )


ROWS = typed().flatmap(lambda one: st.tuples(st.just(one[0]), st.lists(st.none() | one[1], min_size=1, max_size=8)))
TASKS = [
    generate.Config("generate", prompt="{{ text }}"),
    generate.Config("generate", prompt="{% for x in text %}{{ x }}{% endfor %} {{ text.content | upper }}"),
    chat.Config("chat", messages="text", template="{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"),
]


@pytest.mark.parametrize("task", TASKS, ids=["plain", "jinja", "chat"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_rows_of_any_type(tmp_path_factory: pytest.TempPathFactory, task: Any, rows: Any) -> None:
    folder = tmp_path_factory.mktemp("job")
    kind, values = rows
    (folder / "rows").mkdir()
    pq.write_table(pa.table({"text": pa.array(values, kind)}), folder / "rows" / "0.parquet")
    summary = run(make_plan(folder, task=task, max_error_rate=1.0), FakeEngine())
    table = read_output(summary.folder)
    assert table.column("_row").to_pylist() == list(range(len(values)))
    for row in table.to_pylist():
        assert (row["text"] is None) == (row["error_code"] is not None)
        assert row["error_code"] is None or row["error_message"]


class Recording(FakeEngine):
    """Keeps the prompts that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[list[int]] = []

    def submit(self, requests: Any) -> None:
        self.prompts += [list(request.token_ids) for request in requests]
        super().submit(requests)

    def _outcome(self, request: Request) -> Outcome:
        return Outcome(request.request_id, "length", [1], num_prompt_tokens=len(request.token_ids))


def control_tokens() -> dict[str, int]:
    found = load_tokenizer(str(DEMO))
    added = found._tokenizer.get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if token.special}


SPELLINGS = sorted(control_tokens())
ATTACKS = st.lists(st.sampled_from([*SPELLINGS, "<", "|", ">", "im_", "end", " ", "\n", "</s>", "a"]), max_size=8)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=ATTACKS, other=ATTACKS)
def test_data_spells_no_control_token(tmp_path_factory: pytest.TempPathFactory, parts: Any, other: Any) -> None:
    """The prompt of a row has the control tokens of the template and not one more, whatever the row says."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "rows").mkdir()
    (folder / "model").symlink_to(DEMO)
    ids = set(control_tokens().values())
    pq.write_table(pa.table({"a": ["x", "".join(parts)], "b": ["x", "".join(other)]}), folder / "rows" / "0.parquet")
    for name, task in {
        "generate": generate.Config("generate", prompt="{{ a }}{{ b }}"),
        "chat": chat.Config("chat", user="{{ a }}{{ b }}", template=f"{SPELLINGS[0]}{{{{ messages[0].content }}}}"),
    }.items():
        engine = Recording()
        run(make_plan(folder, name=name, task=task, max_error_rate=1.0), engine)
        counts = [sum(token in ids for token in prompt) for prompt in engine.prompts]
        assert len(set(counts)) <= 1, (counts, parts, other)


def test_prompts_of_ten_megabytes(tmp_path: Path) -> None:
    """Refused by their length, in the time that it takes to read them."""
    texts = ["short", "x" * (MAX_PROMPT_CHARS + 1), "word " * (MAX_PROMPT_CHARS // 5), "short"]
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"text": texts}), tmp_path / "rows" / "0.parquet")
    began = time.process_time()
    table = read_output(run(make_plan(tmp_path, max_error_rate=1.0), FakeEngine()).folder)
    assert table.column("error_code").to_pylist() == [None, "too_long", "too_long", None]
    assert time.process_time() - began < 60
