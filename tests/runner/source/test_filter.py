"""The filter language: what it takes, what it refuses and how it says so."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import ConfigError
from runner.source.filter import parse

TABLE = pa.table(
    {
        "lang": ["en", "de", None, "en"],
        "score": [0.1, 0.5, 0.9, None],
        "count": pa.array([1, 2, 3, 4], pa.int32()),
        "flag": [True, False, None, True],
        "meta": [{"source": "web", "n": 1}, {"source": "book", "n": 2}, None, {"source": None, "n": 4}],
        "a name": [1, 2, 3, 4],
        "null": ["x", "y", "z", "x"],
    }
)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("lang == 'en'", [1, 4]),
        ("lang == 'en' and score >= 0.1", [1]),
        ("not lang == 'en'", [2]),
        ("lang != 'en' or lang is null", [2, 3]),
        ("lang in ('de', 'fr')", [2]),
        ("lang not in ['de']", [1, 4]),
        ("0.2 < score <= 0.9", [2, 3]),
        ("count > 2.5 or count == -1", [3, 4]),
        ("flag", [1, 4]),
        ("flag == false", [2]),
        ("flag is not null and not flag", [2]),
        ("meta.source == 'web' or meta.n > 3", [1, 4]),
        ("col('a name') >= 3", [3, 4]),
        ("col('null') == 'x'", [1, 4]),
        ("score < count", [1, 2, 3]),
        ("meta is None", [3]),
        ("count in ()", []),
    ],
)
def test_rows_kept(text: str, kept: list[int]) -> None:
    found = TABLE.drop_columns([] if "null')" in text else ["null"])
    assert found.filter(parse(text, found.schema).expression).column("count").to_pylist() == kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lng == 'en'", "did you mean lang?"),
        ("lang = 'en'", "write == for equality"),
        ("lang == null", "nothing equals null"),
        ("score > 'x'", "compares types that do not go together"),
        ("lang", "this column is not boolean"),
        ("1 == 1", "expected a column on one side"),
        ("lang in 'en'", "expected values in parentheses"),
        ("count in ('a',)", "expected values of the column's type, int32"),
        ("lang is 'en'", "expected `is null`"),
        ("meta.sorce == 'x'", "has no field 'sorce'"),
        ("len(lang) > 3", "expected comparisons"),
        ("__import__('os').system('true') == 0", "expected comparisons"),
        ("lang == 'a' if flag else flag", "expected comparisons"),
        ("count + 1 == 2", "expected comparisons"),
        ("count == 99999999999999999999", "fits 64 bits"),
        ("lang == b'en'", "expected a string, a number"),
        ("(lambda: flag)()", "expected comparisons"),
        ("", "cannot be read"),
        ("not " * 3000 + "flag", "12004 characters"),
        ("(" * 500 + "flag" + ")" * 500, "cannot be read"),
        ("not " * 2000 + "flag", ""),
        ("flag and " * 1000 + "flag ==", "cannot be read"),
    ],
)
def test_refused_with_a_reason(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.filter: ") as error:
        parse(text, TABLE.drop_columns(["null"]).schema)
    assert message in str(error.value)


TOKENS = [
    "lang",
    "score",
    "flag",
    "meta.n",
    "==",
    "<",
    "and",
    "or",
    "not",
    "in",
    "is",
    "null",
    "(",
    ")",
    "1",
    "'x'",
    ",",
]


@given(st.lists(st.sampled_from(TOKENS), max_size=12))
@settings(max_examples=500, deadline=None)
def test_any_text_is_a_filter_or_a_message(tokens: list[str]) -> None:
    try:
        found = parse(" ".join(tokens), TABLE.schema)
    except ConfigError as error:
        assert str(error).startswith("dataset.filter: ")
    else:
        TABLE.filter(found.expression)
