"""Templates of unknown origin: nothing leaves the sandbox, nothing runs without end, nothing fills the memory."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import ConfigError, RowError
from runner.prompt import Template
from tests.conftest import ROOT

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__cla' ~ 'ss__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ text.format.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(text) }}",
    "{{ '{a.__class__}'.format_map({'a': text}) }}",
    "{{ ('{0.__cla' ~ 'ss__}').format(text) }}",
    "{{ text.encode().decode.__self__.__class__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.popen('touch owned').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('touch owned') }}",
    "{{ url_for.__globals__ }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ config.items() }}",
    "{{ range.__class__.__base__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ dict.mro() }}",
    "{{ dict(a=1).__class__ }}",
    "{% set x = cycler('a') %}{{ x.next.__func__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "{% macro m() %}{{ caller.__class__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for x in [1] %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
    "{% for x in [1] %}{{ loop._iterator.gi_frame.f_globals }}{% endfor %}",
    "{{ (text for text in [1]).gi_frame }}",
    "{{ [].append.__self__.__class__ }}",
    "{{ text.__add__('x') }}",
    "{{ [1, 2].append(3) }}",
    "{{ {}.update({1: 2}) }}",
    "{{ text|map(attribute='__class__')|list }}",
    "{{ [text]|groupby('__class__') }}",
    "{{ [text]|sort(attribute='__class__') }}",
    "{{ [text]|selectattr('__class__')|list }}",
    "{{ [text]|sum(attribute='__class__') }}",
    "{{ [text]|join('', attribute='__class__') }}",
    "{{ [[text]]|map('first')|map('attr', '__class__')|list }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% from 'os' import system %}",
    "{% extends '/etc/passwd' %}",
    "{{ environment }}",
    "{{ context }}",
    "{% print(''.__class__) %}",
]
ENDLESS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{{ 'x' * 10**10 }}",
    "{{ ['x'] * 10**10 }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ 'x'|center(10**10) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ 9**9**9 }}",
    "{{ 1 // 0 }}",
    "{{ 10**400 * 1.0 }}",
    "{{ ('x' * 10**6)|replace('x', 'y' * 10**6) }}",
    "{{ ('x,' * 10**6).split(',')|join('y' * 10**6) }}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|length }}",
    "{{ range(10**9)|list }}",
    "{{ range(10**9)|sum }}",
    "{{ range(10**9)|map('string')|join }}",
    "{{ range(10**8)|sort }}",
    "{{ range(10**9)|batch(2)|list }}",
    "{{ ''|indent(10**10) }}",
    "{{ text|tojson(indent=10**9) }}",
    "{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaa!'|urlize }}",
    "{{ ('a ' * 10**6)|wordwrap(1) }}",
    "{{ '\\t'.expandtabs(10**10) }}",
    "{{ 1.5|round(10**9) }}",
]
ALLOWED_S = 30.0
"""Several times what the budget allows, for machines that are busy."""
CHILD = """
import resource, sys
import pyarrow as pa
from runner.prompt import Template
for text in sys.stdin.read().split("\\0"):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        template = Template(text, "task.prompt")
        template.render(pa.record_batch({name: ["x"] for name in [*template.columns, "text"]}))
    except Exception as error:
        assert type(error).__name__ == "ConfigError", (text, error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1_500_000, (text, grown)
"""


def render(text: str, value: Any = "a text") -> list[str | RowError]:
    """Of one row, in which every column that the template reads has the value."""
    template = Template(text, "task.prompt")
    return template.render(pa.record_batch({name: pa.array([value]) for name in [*template.columns, "text"]}))


@pytest.mark.parametrize("text", ESCAPES)
def test_nothing_leaves_the_sandbox(text: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        made = render(text)
    except ConfigError:
        made = []
    for result in made:
        said = result.message if isinstance(result, RowError) else result
        assert isinstance(result, RowError) or not any(word in said for word in ("<class", "function", "object at"))
        assert "root:" not in said and "builtin" not in said
    assert not list(tmp_path.iterdir())


def test_work_without_end_is_ended() -> None:
    """Each within the budget's time and memory, in one process that would be killed with more."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input="\0".join(ENDLESS).encode(),
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        timeout=ALLOWED_S * len(ENDLESS),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert time.monotonic() - began < ALLOWED_S * len(ENDLESS) / 2


EXPRESSIONS = st.recursive(
    st.sampled_from(["text", "row['text']", "'x'", "1", "-1", "10**3", "[1, 'a']", "{'k': text}", "none", "range(5)"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "*", "**", "~", "%", "-", "//", "==", "in", "and", "<"]), inner).map(
            lambda parts: f"({' '.join(parts)})"
        ),
        st.tuples(inner, st.sampled_from(["upper", "list", "join", "length", "tojson", "sum", "sort", "unique", "first",
                                          "string", "int", "reverse", "trim", "center(99)", "replace('a', 'bb')",
                                          "map('upper')", "batch(2)", "dictsort", "indent", "e", "round", "format(1)"]))
        .map(lambda parts: f"({parts[0]}|{parts[1]})"),
        st.tuples(inner, st.sampled_from(["__class__", "format(text)", "split()", "items()", "zfill(9)", "x"]))
        .map(lambda parts: f"{parts[0]}.{parts[1]}"),
        st.tuples(inner, inner).map(lambda parts: f"{parts[0]}[{parts[1]}]"),
        st.tuples(inner, inner, inner).map(lambda parts: f"({parts[0]} if {parts[1]} else {parts[2]})"),
    ),
    max_leaves=8,
)  # fmt: skip
STATEMENTS = st.one_of(
    EXPRESSIONS.map(lambda e: f"{{{{ {e} }}}}"),
    st.tuples(EXPRESSIONS, EXPRESSIONS).map(lambda p: f"{{% for x in {p[0]} %}}{{{{ {p[1]} }}}}{{% endfor %}}"),
    EXPRESSIONS.map(lambda e: f"{{% if {e} %}}y{{% endif %}}"),
    st.text(alphabet="{}%#|'\"()[]x.1 \n", max_size=12),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(STATEMENTS, min_size=1, max_size=3).map("".join), st.text(max_size=20) | st.none())
def test_any_template_is_text_an_error_of_its_row_or_a_message(text: str, value: str | None) -> None:
    try:
        made = render(text, value)
    except ConfigError as error:
        assert "; expected " in str(error)
        return
    assert len(made) == 1 and isinstance(made[0], (str, RowError))
    if isinstance(made[0], str):
        assert "<class" not in made[0] and "object at 0x" not in made[0]
