"""Jinja for templates of unknown origin: no attribute that leads out of the template, and no work without end.

On top of Jinja's sandbox, a render has a budget. Each turn of a loop, each call, each filter and all text that comes
into being is charged, before it is made where it can be large; so what a template may do is the same on every machine.
A limit on processor time stands behind that. There are no files to include, and nothing random.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

BUDGET = 200_000_000
"""Characters that one render may bring into being, in all its variables and for whatever use."""
STEP = 200
"""What a turn of a loop, a call and a filter cost beside that: at most a million of them."""
MAX_TIME_S = 10.0
"""Processor time of one render. Waiting and being stopped do not count."""
MAX_TEMPLATE_CHARS = 1_000_000
MAX_INT_BITS = 100_000
_ITEM_BYTES = 8
_VISIT = 50
"""What looking at a part of a container costs: a template can make few parts stand in many places."""
_LEFT_OUT = ("random", "urlize", "wordwrap", "xmlattr")
"""Filters that give another prompt each time, or are for web pages and take unbounded time."""
_LOOKS_AT_FEW = {
    "attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject",
    "rejectattr", "reverse", "select", "selectattr", "slice",
}  # fmt: skip
"""Filters that pass values on without making text of them or comparing them."""
_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView, Namespace)
_DIGITS = re.compile(r"\d+")
_NESTED_FIELD = re.compile(r":[^{}]*\{")


class BudgetError(Exception):
    """A template does more than one row may."""


class _Metered(CodeGenerator):
    """Code that reports to the environment what Jinja has no hook for: loops, `~`, comparisons, tuples."""

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        for loop in node.find_all(nodes.For):
            loop.body.insert(0, _step(loop.body))
            if loop.test is not None:
                loop.test = nodes.And(nodes.EnvironmentAttribute("step(0)"), loop.test)
        for macro in node.find_all(nodes.Macro):
            macro.body.insert(0, _step(macro.body))
        for block in node.find_all(nodes.CallBlock):
            block.body.insert(0, _step(block.body))
        super().visit_Template(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        if (
            len(node.ops) == 1
            and node.ops[0].op not in ("in", "notin")
            and any(isinstance(side, nodes.Const) for side in (node.expr, node.ops[0].expr))
        ):
            super().visit_Compare(node, frame)  # as short as the constant is
            return
        self.write("(")
        self._comparable(node.expr, frame)
        for operand in node.ops:
            self.write(f" {_OPERATORS[operand.op]} ")
            self._comparable(operand.expr, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        # Tuples in tuples are hashed by recursion, however many there are.
        if node.ctx != "load":
            super().visit_Tuple(node, frame)
            return
        self.write("environment.spread(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def _comparable(self, node: nodes.Expr, frame: Frame) -> None:
        if isinstance(node, nodes.Const):
            self.visit(node, frame)
            return
        self.write("environment.comparable(")
        self.visit(node, frame)
        self.write(")")


_OPERATORS = {
    "eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in",
}  # fmt: skip


def _step(body: list[nodes.Node]) -> nodes.Node:
    """The statement at the beginning of a body that may run any number of times: it charges the body's own text."""
    text = sum(len(data.data) for part in body for data in _texts(part))
    return nodes.ExprStmt(nodes.EnvironmentAttribute(f"step({text})"))


def _texts(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        yield node
    elif not isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):  # they charge their own
        for child in node.iter_child_nodes():
            yield from _texts(child)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template, used by one thread at a time. `start` comes before each render."""

    code_generator_class = _Metered
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, finalize: Callable[[Any], Any] | None = None, **options: Any) -> None:
        """finalize: is applied to every value that is printed; options: of a jinja2.Environment."""
        # Constants are not computed at compile time, where no budget runs.
        super().__init__(optimized=False, finalize=_printed, **options)
        self._finalize = finalize
        self.globals.pop("lipsum")
        self.filters["tojson"] = _to_json
        self.filters = {
            name: self._metered(name, function) for name, function in self.filters.items() if name not in _LEFT_OUT
        }
        self.start()

    def start(self) -> None:
        """A new budget."""
        self._left = BUDGET
        self._ends_s = time.thread_time() + MAX_TIME_S
        self._unchecked = 0

    def compiled(self, text: str, key: str) -> tuple[jinja2.Template, nodes.Template]:
        """(template, syntax tree). Raises ValueError, saying what is wrong with the text.

        key: where the template stands, for Jinja's own messages.
        """
        if len(text) > MAX_TEMPLATE_CHARS:
            raise ValueError(f"{len(text):,} characters; expected at most {MAX_TEMPLATE_CHARS:,}")
        try:
            tree = self.parse(text, key)
            for kind in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends):
                if other := tree.find(kind):
                    raise ValueError(f"{kind.__name__.lower()} in line {other.lineno}, and there are no other files")
            return self.from_string(text), tree
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{error.message} in line {error.lineno}") from None
        except (RecursionError, MemoryError, SyntaxError, OverflowError) as error:
            raise ValueError(f"cannot be compiled ({type(error).__name__}: it is nested too deep)") from None

    # What is charged.

    def charge(self, size: int) -> None:
        """Take that many characters off the budget. Raises BudgetError when there are not so many left."""
        self._left -= size
        self._unchecked += size
        if self._left < 0:
            raise BudgetError(f"makes more than {BUDGET // STEP:,} steps or {BUDGET:,} characters for one row")
        if self._unchecked > 256 * STEP:
            self._unchecked = 0
            if time.thread_time() > self._ends_s:
                raise BudgetError(f"takes more than {MAX_TIME_S:g} s for one row")

    def step(self, text: int = 0) -> bool:
        """Called by compiled templates. text: characters of the template's own that follow."""
        self.charge(STEP + text)
        return True

    def spread(self, value: Any) -> Any:
        """The value, once its whole length as text is charged. Parts that are there several times count each time."""
        size, parts = 0, [value]
        while parts:
            part = parts.pop()
            if isinstance(part, (str, bytes)):
                size += len(part) + 2
            elif isinstance(part, int):
                size += part.bit_length() // 3 + 2
            elif isinstance(part, _CONTAINERS):
                inner = _inner(part)
                size += _VISIT * len(inner) + 2
                parts += inner
            else:
                size += 64
            if size > self._left:
                break
        self.charge(size)
        return value

    def comparable(self, value: Any) -> Any:
        """A side of a comparison: those of texts cost at most their length, those of containers all that is in them."""
        if isinstance(value, str):
            if len(value) > STEP:
                self.charge(len(value))
            return value
        return self.spread(value) if isinstance(value, _CONTAINERS) else value

    def joined(self, parts: Iterable[Any]) -> str:
        for part in parts:
            self.spread(part)
        return "".join(map(str, parts))

    def printed(self, value: Any) -> Any:
        value = value if self._finalize is None else self._finalize(value)
        if isinstance(value, str):
            self.charge(len(value))
            return value
        return self.spread(value)

    # Jinja's hooks.

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.charge(self._operation_size(operator, left, right))
        if isinstance(left, tuple) or isinstance(right, tuple):
            return self.spread(super().call_binop(context, operator, left, right))
        return super().call_binop(context, operator, left, right)

    def _operation_size(self, operator: str, left: Any, right: Any) -> int:
        """What an operation makes, in characters. Raises BudgetError for integers that are too large."""
        if operator == "%":
            return _formatted_size(left, right if isinstance(right, tuple) else (right,), "*")
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            if (max(right, 0) * bits[0] if operator == "**" else sum(bits)) > MAX_INT_BITS:
                raise BudgetError(f"makes an integer of more than {MAX_INT_BITS:,} bits")
            return 0
        if operator == "*":
            times = [n for n in (left, right) if isinstance(n, int)]
            return max(times[0], 0) * max(_size(left), _size(right)) if times else 0
        return _size(left) + _size(right)

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.charge(STEP)
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(owner, (str, bytes)):
            if name == "join" and args:
                args = (self._collected(args[0]), *args[1:])
            self.charge(_method_size(owner, name, args, kwargs))
        elif isinstance(owner, int):
            self.charge(sum(abs(n) for n in (*args, *kwargs.values()) if isinstance(n, int)))
        elif isinstance(owner, _CONTAINERS):
            for value in args:
                self.comparable(value)
        result = super().call(context, called, *args, **kwargs)
        self.charge(_size(result))
        return result

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        def formatted(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map" and args and isinstance(args[0], Mapping):
                self.charge(_formatted_size(text, tuple(args[0].values()), "{"))
            else:
                self.charge(_formatted_size(text, (*args, *kwargs.values()), "{"))
            return wrapped(*args, **kwargs)

        return formatted

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        has_context = hasattr(function, "jinja_pass_arg")

        @functools.wraps(function)  # with the mark that says what Jinja passes
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.charge(STEP)
            front, own = args[: int(has_context)], args[int(has_context) :]
            if own and name not in _LOOKS_AT_FEW:
                own = (self._collected(own[0]), *own[1:])
                for value in (*own, *kwargs.values()):
                    self.comparable(value)
            self.charge(_filter_size(name, own, kwargs))
            result = function(*front, *own, **kwargs)
            self.charge(_size(result))
            return result

        return metered

    def _collected(self, value: Any) -> Any:
        """An iterator as a list, its items charged: how much there is cannot be seen otherwise."""
        if not isinstance(value, Iterator):
            return value
        found = []
        for item in value:
            self.charge(STEP)
            found.append(item)
        return found


@jinja2.pass_context
def _printed(context: Context, value: Any) -> Any:
    # With the context, not the environment alone: what needs no context Jinja would call when it compiles.
    return cast(Sandbox, context.environment).printed(value)


@jinja2.pass_environment
def _to_json(
    environment: Sandbox,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter as chat templates know it: unlike Jinja's own it escapes no HTML and keeps letters beyond ASCII."""
    if isinstance(value, jinja2.Undefined):
        raise TypeError("Object of type Undefined is not JSON serializable")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces = []
    for piece in encoder.iterencode(value):
        environment.charge(len(piece))
        pieces.append(piece)
    return "".join(pieces)


def _inner(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, Namespace):
        return [object.__getattribute__(value, "_Namespace__attrs")]
    return list(value)


def _size(value: Any) -> int:
    """Room that a new value takes, what is in it not counted."""
    if isinstance(value, (str, bytes)):
        return len(value)
    return _ITEM_BYTES * len(value) if isinstance(value, (list, tuple, dict, set, frozenset)) else 0


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _filter_size(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The most that a filter makes out of small arguments; 0 where it is about as much as goes in."""
    value = args[0] if args else ""
    text = value if isinstance(value, str) else ""
    if name == "center":
        return _whole(_argument(args, kwargs, 1, "width", 80))
    if name == "indent":
        width = _argument(args, kwargs, 1, "width", 4)
        return (text.count("\n") + 1) * (len(width) if isinstance(width, str) else _whole(width))
    if name in ("batch", "slice"):
        return _ITEM_BYTES * _whole(_argument(args, kwargs, 1, "linecount" if name == "batch" else "slices", 0))
    if name == "round":
        _whole_power(_argument(args, kwargs, 1, "precision", 0))
        return 0
    if name == "replace":
        return _replaced_size(text, _argument(args, kwargs, 1, "old", ""), _argument(args, kwargs, 2, "new", ""))
    if name == "join":
        return _joined_size(value, _argument(args, kwargs, 1, "d", ""))
    if name == "format":
        return _formatted_size(text, (*args[1:], *kwargs.values()), "*")
    if name == "sum" and hasattr(value, "__len__"):
        return len(value) * sum(map(_size, value)) // 2  # lists are added one to the other, each time anew
    if name == "tojson":
        return 0 if (_argument(args, kwargs, 2, "indent", 0) or 0) in range(17) else BUDGET
    return 0


def _method_size(text: str | bytes, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The same for a method of a text."""
    if name in ("center", "ljust", "rjust", "zfill"):
        return _whole(args[0] if args else 0)
    if name == "expandtabs":
        tab: Any = "\t" if isinstance(text, str) else b"\t"
        return text.count(tab) * _whole(_argument(args, kwargs, 0, "tabsize", 8))
    if name == "replace" and len(args) > 1:
        return _replaced_size(text, args[0], args[1])
    if name == "join" and args:
        return _joined_size(args[0], text)
    if name == "translate" and args and isinstance(args[0], dict):
        return len(text) * max((_size(value) for value in args[0].values()), default=0)
    return len(text)


def _replaced_size(text: Any, old: Any, new: Any) -> int:
    if type(text) is not type(old) or not isinstance(new, type(old)) or not isinstance(new, (str, bytes)):
        return 0  # the call fails, or is about markup, which templates here do not make
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _joined_size(items: Any, separator: Any) -> int:
    return len(items) * _size(separator) if hasattr(items, "__len__") else 0


def _formatted_size(text: Any, values: tuple[Any, ...], nesting: str) -> int:
    """Of printf's and of str.format: the widths that the text names, and those that values give; values used again."""
    if not isinstance(text, (str, bytes)):
        return 0
    shown = text if isinstance(text, str) else text.decode("latin-1")
    widths = [_whole(int(digits)) if len(digits) < 12 else BUDGET for digits in _DIGITS.findall(shown)]
    given = nesting in shown if nesting == "*" else _NESTED_FIELD.search(shown) is not None
    widths += [_whole(value) for value in values if given and isinstance(value, int)]
    uses = shown.count("%" if nesting == "*" else "{")
    return len(shown) + sum(widths) * (uses if given else 1) + uses * sum(_printed_size(value) for value in values)


def _printed_size(value: Any) -> int:
    if not isinstance(value, _CONTAINERS):
        return _size(value) if isinstance(value, (str, bytes)) else 64
    size, parts = 0, [value]
    while parts and size < BUDGET:
        part = parts.pop()
        inner = _inner(part) if isinstance(part, _CONTAINERS) else []
        size += _VISIT * len(inner) + (len(part) if isinstance(part, (str, bytes)) else 64)
        parts += inner
    return size


def _whole(value: Any) -> int:
    return min(abs(value), BUDGET + 1) if isinstance(value, int) else 0


def _whole_power(value: Any) -> None:
    if isinstance(value, int) and abs(value) > 300:
        raise BudgetError(f"rounds to {value} places; expected at most 300")
