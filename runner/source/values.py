"""Arrow columns from JSON values: types inferred from many rows, and each value that does not fit told by row.

Types: null, bool, int64, double, string, lists and structs of these. Where rows disagree, numbers become double and
everything else becomes string, in which values that are not strings stand as their JSON text: nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson
import pyarrow as pa

_INT64 = range(-(2**63), 2**63)


MAX_DEPTH = 32
"""Lists and structs in each other; what is deeper stands as JSON text."""
MAX_FIELDS = 256
"""Fields of a struct; an object with more keys is a map rather than a record, and stands as JSON text."""


def infer_type(values: Sequence[Any], depth: int = 0) -> pa.DataType:
    """The type that holds all the values."""
    if depth == 0:
        try:
            found = pa.array(values).type  # Arrow infers alike where the values agree, and faster
            if _allowed(found):
                return found
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            pass
    found = pa.null()
    for value in values:
        found = _merge(found, _type_of(value, depth))
    return found


def _allowed(data_type: pa.DataType, depth: int = 0) -> bool:
    types = pa.types
    if depth > MAX_DEPTH:
        return False
    if types.is_list(data_type):
        return _allowed(data_type.value_type, depth + 1)
    if types.is_struct(data_type):
        return 0 < data_type.num_fields <= MAX_FIELDS and all(_allowed(field.type, depth + 1) for field in data_type)
    return any(data_type.equals(known) for known in (pa.null(), pa.bool_(), pa.int64(), pa.float64(), pa.string()))


def infer_schema(rows: Iterable[dict[str, Any]]) -> pa.Schema:
    """One column for each key of any row, in the order in which they come up. Columns of nulls alone are strings."""
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    return pa.schema([pa.field(key, _without_null(infer_type(found))) for key, found in columns.items()])


def column(values: Sequence[Any], data_type: pa.DataType) -> tuple[pa.Array, dict[int, str]]:
    """Values as an array of a type, and by position the values that do not fit, which become null."""
    try:
        array = pa.array(values)  # by what they are: with a type given, Arrow cuts fractions off silently
        if array.type.equals(data_type):
            return array, {}
        if _simple(array.type) and _simple(data_type) and _widens(array.type, data_type):
            return array.cast(data_type), {}
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        pass
    fitting, misfits = [], {}
    for position, value in enumerate(values):
        try:
            fitting.append(fit(value, data_type))
        except ValueError as error:
            fitting.append(None)
            misfits[position] = str(error)
    return pa.array(fitting, data_type), misfits


def fit(value: Any, data_type: pa.DataType) -> Any:
    """The value as the type has it. Raises ValueError, saying what was found, if it cannot be."""
    types = pa.types
    if value is None:
        return None
    if types.is_string(data_type):
        return value if isinstance(value, str) else _json_text(value)
    if types.is_boolean(data_type) and isinstance(value, bool):
        return value
    if types.is_integer(data_type) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if value == int(value) and int(value) in _INT64:
            return int(value)
    elif types.is_floating(data_type) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif types.is_list(data_type) and isinstance(value, list):
        return [fit(element, data_type.value_type) for element in value]
    elif types.is_struct(data_type) and isinstance(value, dict):
        return {field.name: fit(value.get(field.name), field.type) for field in data_type}
    text = repr(value)
    raise ValueError(f"found {text if len(text) <= 60 else text[:57] + '...'}; expected {data_type}")


def _json_text(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # orjson's limit of 254 levels
        raise ValueError("found a value nested too deep; expected at most 250 levels") from None


def _type_of(value: Any, depth: int = 0) -> pa.DataType:
    if isinstance(value, (list, dict)) and (
        depth >= MAX_DEPTH or (len(value) > MAX_FIELDS and isinstance(value, dict))
    ):
        return pa.string()
    if value is None:
        return pa.null()
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64() if value in _INT64 else pa.float64()
    if isinstance(value, float):
        return pa.float64()
    if isinstance(value, list):
        return pa.list_(infer_type(value, depth + 1))
    if isinstance(value, dict):
        return pa.struct([pa.field(key, _type_of(element, depth + 1)) for key, element in value.items()])
    return pa.string()


def _merge(left: pa.DataType, right: pa.DataType) -> pa.DataType:
    types = pa.types
    if left is right or left.equals(right) or types.is_null(right):
        return left
    if types.is_null(left):
        return right
    if {str(left), str(right)} == {"int64", "double"}:
        return pa.float64()
    if types.is_list(left) and types.is_list(right):
        return pa.list_(_merge(left.value_type, right.value_type))
    if types.is_struct(left) and types.is_struct(right):
        fields = {field.name: field.type for field in left}
        for field in right:
            fields[field.name] = _merge(fields.get(field.name, pa.null()), field.type)
        if len(fields) > MAX_FIELDS:
            return pa.string()
        return pa.struct([pa.field(name, data_type) for name, data_type in fields.items()])
    return pa.string()


def _without_null(data_type: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_null(data_type):
        return pa.string()
    if types.is_list(data_type):
        return pa.list_(_without_null(data_type.value_type))
    if types.is_struct(data_type):
        if data_type.num_fields == 0:
            return pa.string()
        return pa.struct([pa.field(field.name, _without_null(field.type)) for field in data_type])
    return data_type


def _simple(data_type: pa.DataType) -> bool:
    return not pa.types.is_nested(data_type)


def _widens(found: pa.DataType, wanted: pa.DataType) -> bool:
    return pa.types.is_null(found) or (pa.types.is_int64(found) and pa.types.is_float64(wanted))
