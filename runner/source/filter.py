"""`dataset.filter`: a small expression language over columns, read with Python's parser and evaluated by Arrow.

    lang == 'en' and score >= 0.5
    label in ('a', 'b') or not (text is null)
    0 < length <= 100 and meta.source != 'web' and col('column with spaces') == true

Names are columns, dots reach into structs. Nothing is executed: the tree is translated node by node, and any other node
is refused. A row is kept where the expression is true; comparing a null gives null, which is not true.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from runner.errors import ConfigError

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_LITERAL_NAMES = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_GRAMMAR = (
    "comparisons (== != < <= > >=), in (...), is null, is not null, and, or, not, parentheses, columns and literals"
)
_MAX_LENGTH = 10_000


@dataclass(frozen=True)
class Filter:
    """A parsed filter."""

    expression: pc.Expression
    columns: tuple[str, ...]
    """Top-level columns that it reads."""


def parse(text: str, schema: pa.Schema) -> Filter:
    """The filter that a text says, over columns of a schema.

    Raises:
        ConfigError: Not in the language, an unknown column, or types that cannot be compared.
    """
    if len(text) > _MAX_LENGTH:
        raise ConfigError(f"dataset.filter: {len(text)} characters; expected at most {_MAX_LENGTH}; filter the input")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        hint = "; write == for equality" if "'=='" in str(error) or " = " in text else ""
        raise ConfigError(
            f"dataset.filter: {text!r} cannot be read ({getattr(error, 'msg', error)}); expected {_GRAMMAR}{hint}"
        ) from None
    translator = _Translator(text, schema)
    try:
        expression = translator.condition(tree.body)
    except RecursionError:
        raise ConfigError("dataset.filter: nested too deep; expected a short expression; filter the input") from None
    try:
        schema.empty_table().filter(expression)
    except pa.ArrowException as error:
        types = ", ".join(f"{name}: {schema.field(name).type}" for name in translator.columns)
        raise ConfigError(
            f"dataset.filter: {text!r} compares types that do not go together ({str(error).splitlines()[0][:200]}); "
            f"the columns are {types}"
        ) from None
    return Filter(expression, tuple(translator.columns))


class _Translator:
    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text = text
        self.schema = schema
        self.columns: dict[str, None] = {}

    def condition(self, node: ast.expr) -> pc.Expression:
        """A node that is true or false."""
        if isinstance(node, ast.BoolOp):
            combine = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            result = self.condition(node.values[0])
            for value in node.values[1:]:
                result = combine(result, self.condition(value))
            return result
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.condition(node.operand)
        if isinstance(node, ast.Compare):
            return self.comparison(node)
        field, data_type = self.column(node)
        if not pa.types.is_boolean(data_type):
            raise self.refuse(node, "expected a comparison: this column is not boolean")
        return field

    def comparison(self, node: ast.Compare) -> pc.Expression:
        result = None
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            term = self.term(left, op, right)
            result = term if result is None else result & term
            left = right
        assert result is not None
        return result

    def term(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        if isinstance(op, (ast.In, ast.NotIn)):
            if not isinstance(right, (ast.Tuple, ast.List, ast.Set)):
                raise self.refuse(right, "expected values in parentheses after `in`")
            field, data_type = self.column(left)
            values = [self.literal(element) for element in right.elts]
            try:
                found = field.isin(pa.array(values, data_type))
            except (pa.ArrowException, TypeError, ValueError):
                raise self.refuse(right, f"expected values of the column's type, {data_type}") from None
            return found if isinstance(op, ast.In) else ~found & field.is_valid()
        if isinstance(op, (ast.Is, ast.IsNot)):
            if not self.is_literal(right) or self.literal(right) is not None:
                raise self.refuse(right, "expected `is null` or `is not null`")
            field, _ = self.column(left)
            return field.is_null() if isinstance(op, ast.Is) else field.is_valid()
        if self.is_literal(left) and self.is_literal(right):
            raise self.refuse(left, "expected a column on one side of a comparison")
        return _COMPARISONS[type(op)](self.operand(left), self.operand(right))

    def operand(self, node: ast.expr) -> Any:
        if not self.is_literal(node):
            return self.column(node)[0]
        value = self.literal(node)
        if value is None:
            raise self.refuse(node, "nothing equals null; expected `is null` or `is not null`")
        return pc.scalar(value)

    def is_literal(self, node: ast.expr) -> bool:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            return True
        if isinstance(node, ast.Name):
            return node.id in _LITERAL_NAMES and node.id not in self.schema.names
        return isinstance(node, ast.Constant)

    def literal(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and self.is_literal(node):
            return _LITERAL_NAMES[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            value = self.literal(node.operand)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return -value if isinstance(node.op, ast.USub) else value
        elif isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, bool, type(None))):
            if isinstance(node.value, int) and abs(node.value) >= 2**63:
                raise self.refuse(node, "expected a number that fits 64 bits")
            return node.value
        raise self.refuse(node, "expected a string, a number, true, false or null")

    def column(self, node: ast.expr) -> tuple[pc.Expression, pa.DataType]:
        """A column or a field of a struct column, and its type."""
        path = self.column_path(node)
        name = path[0]
        if name not in self.schema.names:
            near = difflib.get_close_matches(name, self.schema.names, n=1)
            raise ConfigError(
                f"dataset.filter: there is no column {name!r}; expected some of {', '.join(self.schema.names)}; "
                + (f"did you mean {near[0]}?" if near else "correct the name")
            )
        data_type = self.schema.field(name).type
        for field in path[1:]:
            if not pa.types.is_struct(data_type) or data_type.get_field_index(field) < 0:
                raise self.refuse(node, f"{data_type} has no field {field!r}")
            data_type = data_type.field(field).type
        self.columns[name] = None
        return pc.field(*path), data_type

    def column_path(self, node: ast.expr) -> tuple[str, ...]:
        if isinstance(node, ast.Name):
            return (node.id,)
        if isinstance(node, ast.Attribute):
            return (*self.column_path(node.value), node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "col":
            arguments = node.args
            if len(arguments) == 1 and not node.keywords and isinstance(arguments[0], ast.Constant):
                name = arguments[0].value
                if isinstance(name, str):
                    return (name,)
        raise self.refuse(node, f"expected {_GRAMMAR}")

    def refuse(self, node: ast.expr, why: str) -> ConfigError:
        part = ast.get_source_segment(self.text.strip(), node) or ast.dump(node)
        return ConfigError(f"dataset.filter: {part!r} in {self.text!r}: {why}")
