"""What a configuration may hold, read off the dataclasses: checks of plain values, and the words for help and docs.

Knows nothing of particular keys. A field's type, default, metadata (bounds) and the string under it are all there is.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LONGEST_SHOWN = 200
"""Characters of a wrong value in a message."""
MISSING = "???"
"""How YAML says that a value must be given."""


INT64 = range(-(2**63), 2**63)
"""What an integer may be: everything that takes one, Arrow and JSON among them, has 64 bits for it."""


@dataclass(frozen=True)
class Key:
    """One key of the configuration."""

    name: str
    hint: Any
    """The field's type."""
    default: Any
    """dataclasses.MISSING for a key without one."""
    bounds: Mapping[str, Any] = field(default_factory=dict)
    """ge, gt, le, lt, choices, power_of_two."""
    doc: str = ""

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def is_group(self) -> bool:
        """Whether there are keys below this one."""
        return dataclasses.is_dataclass(self.hint)


def keys(cls: Any) -> tuple[Key, ...]:
    """The keys of a dataclass, its bases' first."""
    hints, docs = typing.get_type_hints(cls), _docs(cls)
    return tuple(
        Key(
            f.name,
            hints[f.name],
            f.default if f.default_factory is dataclasses.MISSING else f.default_factory(),
            f.metadata,
            docs.get(f.name, ""),
        )
        for f in dataclasses.fields(cls)
    )


def arguments(schema: Sequence[Key], values: Any, path: str, findings: list[str]) -> dict[str, Any]:
    """The values, converted to the types of the schema; what is wrong with them is added to `findings`, one line each.

    A key that is left out has its default: it is not among the arguments.
    """
    where = f"{path}." if path else ""
    if not isinstance(values, Mapping):
        findings.append(f"{path or 'configuration'}: {_shown(values)}; expected keys with values; correct it")
        return {}
    known = {key.name: key for key in schema}
    for name in values:
        if name not in known:
            expected = f"expected one of {', '.join(known)}" if known else "expected no keys"
            shown = name if str(name).isprintable() else repr(name)
            findings.append(f"{where}{shown}: no such key; {expected}; {advice(str(name), known, 'remove it')}")
    result = {}
    for name, key in known.items():
        if name not in values or values[name] == MISSING:
            if key.required or name in values:
                findings.append(
                    f"{where}{name}: not set; expected {expected_words(key)}; set it, as in {where}{name}=..."
                )
        elif key.is_group:
            before = len(findings)
            inner = arguments(keys(key.hint), values[name], where + name, findings)
            if len(findings) == before:
                result[name] = key.hint(**inner)
        else:
            try:
                result[name] = convert(key.hint, values[name])
                check(key.bounds, result[name])
            except (ValueError, OverflowError):
                findings.append(finding(where + name, values[name], key))
    return result


def finding(path: str, value: Any, key: Key) -> str:
    """The line about a value that a key may not have."""
    choices = key.bounds.get("choices") or _literals(key.hint)
    in_brackets = expected_words(key).startswith("a list") and isinstance(value, (str, int, float))
    otherwise = f"put it in brackets, as in {path}=[{value}]" if in_brackets else "correct it"
    expected = expected_words(key)
    if type(value) is int and value not in INT64:
        expected = expected.replace("an integer", "an integer of 64 bits", 1)
    if not _is_utf8(value):
        expected = expected.replace("text", "text in UTF-8", 1)
    return f"{path}: {_shown(value)}; expected {expected}; {advice(str(value), choices, otherwise)}"


def _is_utf8(value: Any) -> bool:
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def out_of_bounds(config: Any, path: str) -> list[str]:
    """The same lines for a dataclass instance that was not made from a configuration."""
    found = []
    for key in keys(type(config)):
        value = getattr(config, key.name)
        try:
            check(key.bounds, value)
        except ValueError:
            found.append(finding(f"{path}.{key.name}", value, key))
    return found


def convert(hint: Any, value: Any) -> Any:
    """A plain value as the type that is asked for. Raises ValueError or OverflowError."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _first_that_fits([member for member in inner if member is not type(None)], value)
    if hint is Any:
        json.dumps(value, ensure_ascii=False, default=str).encode()
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _finite(float(value))
    # `cuda: 13.0` and `name=2024` are numbers to YAML, but only text makes sense there.
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        str(value).encode()  # what was no UTF-8 on the command line can be in no file of the output
        return str(value)
    if hint is bool and type(value) is bool:
        return value
    if hint is int and type(value) is int and value in INT64:
        return value
    if origin is typing.Literal and value in inner:
        return value
    if origin in (list, tuple) and isinstance(value, list):
        return origin(convert(inner[0], item) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return {convert(inner[0], name): convert(inner[1], item) for name, item in value.items()}
    raise ValueError


def check(bounds: Mapping[str, Any], value: Any) -> None:
    """Raises ValueError when a value is outside its bounds. null is never outside."""
    if value is None:
        return
    sound = {
        "ge": lambda bound: value >= bound,
        "gt": lambda bound: value > bound,
        "le": lambda bound: value <= bound,
        "lt": lambda bound: value < bound,
        "choices": lambda bound: value in bound,
        "power_of_two": lambda bound: value > 0 and value & (value - 1) == 0,
    }
    if not all(sound[name](bound) for name, bound in bounds.items()):
        raise ValueError


def expected_words(key: Key) -> str:
    """What a key may be, in words: "an integer, at least 1, or null"."""
    if key.is_group:
        return "keys with values"
    choices = key.bounds.get("choices")
    words = f"one of {', '.join(choices)}" if choices else _type_words(key.hint)
    limits = [_BOUND_WORDS[name].format(bound) for name, bound in key.bounds.items() if name in _BOUND_WORDS]
    if limits:
        words += ", " + " and ".join(limits)
    return words + (", or null" if type(None) in typing.get_args(key.hint) else "")


def default_words(key: Key) -> str:
    """A default as it is written in YAML; empty for a key without one."""
    if key.required or dataclasses.is_dataclass(key.default):
        return ""
    value = key.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(str, value))}]"
    return "''" if value == "" else str(value)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a wrong one was probably meant to be."""
    name = name.lower()
    by_case = {str(candidate).lower(): str(candidate) for candidate in known}
    # Swapped letters first: difflib takes `modle` for `mode`, not for `model`.
    found = [candidate for candidate in by_case if sorted(candidate) == sorted(name)]
    found = found or difflib.get_close_matches(name, by_case, n=1)
    return by_case[found[0]] if found else None


def summary(cls: Any) -> str:
    """The first sentence of a class's docstring."""
    lines = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    return lines.split(". ")[0].rstrip(".")


_BOUND_WORDS = {
    "ge": "at least {}",
    "gt": "more than {}",
    "le": "at most {}",
    "lt": "less than {}",
    "power_of_two": "a power of two",
}
_TYPE_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Any: "any value"}


def _type_words(hint: Any) -> str:
    origin = typing.get_origin(hint)
    inner = [member for member in typing.get_args(hint) if member not in (type(None), Ellipsis)]
    if hint in _TYPE_WORDS:
        return _TYPE_WORDS[hint]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_words(member) for member in inner)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (list, tuple):
        return f"a list of {_type_words(inner[0]).removeprefix('an ').removeprefix('a ')}s"
    if origin is dict:
        return f"names with {_type_words(inner[1])}"
    return "keys with values"


def _first_that_fits(members: Sequence[Any], value: Any) -> Any:
    # An exact type first, so that int | str leaves 1 and "1" apart.
    for member in sorted(members, key=lambda member: member is not type(value)):
        try:
            return convert(member, value)
        except ValueError:
            continue
    raise ValueError


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError
    return value


def _literals(hint: Any) -> list[str]:
    return [str(member) for member in typing.get_args(hint)] if typing.get_origin(hint) is typing.Literal else []


def advice(name: str, known: Iterable[str], otherwise: str) -> str:
    """What to do about a wrong name."""
    near = nearest(name, known)
    return f"did you mean {near}?" if near else otherwise


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


@functools.cache
def _docs(cls: Any) -> dict[str, str]:
    """The string under each field, by field name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not isinstance(base, type) or not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[statement.target.id] = " ".join(str(below.value.value).split())
    return found
