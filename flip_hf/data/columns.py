"""Look up values in rows by the names of columns, which may be nested or have alternatives."""

from typing import Any

from flip_hf.data.refusals import RefusedSample
from flip_hf.data.texts import read_json


def column_value(row: dict, column: str) -> Any:
    """Returns the value under a column name, or None if there is none.

    Dots lead into nested dictionaries and JSON texts; of alternatives (`jpg;png`) the first existing one is used.

    Raises:
        RefusedSample: the value was too large to be read, or is in a text that is not JSON or too large.
    """
    for name in column.split(";"):
        value = _nested_value(row, name)
        if isinstance(value, RefusedSample):
            raise value
        if value is not None:
            return value
    return None


def _nested_value(row: dict, column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, RefusedSample):
            return value
        if isinstance(value, (bytes, str)):
            value = read_json(value)
        value = value.get(part) if isinstance(value, dict) else None
    return value


def is_among(column: str, columns: list[str]) -> bool:
    """Returns whether one of a name's alternatives is a column, or nested in one."""
    return any(part in columns or part.split(".")[0] in columns for part in column.split(";"))
