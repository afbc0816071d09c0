"""Looks up values in rows by the names of columns, which may be nested, have alternatives, or carry weights."""

import math
from typing import Any

from flip_hf.data.refusals import RefusedSample
from flip_hf.data.texts import read_json

_WEIGHTS = "--caption_column 'caption:3 alt_text:1', with a positive number for each column"


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


def has_weights(column: str, columns: list[str]) -> bool:
    """Returns whether a name gives weights, `caption:3 alt_text:1`, rather than being the name of a column itself."""
    return any(":" in part and part not in columns for part in column.split(";"))


def read_weights(column: str) -> tuple[tuple[str, float], ...]:
    """Parses columns with weights, `caption:3 alt_text:1`, into pairs of name and weight.

    Raises:
        ValueError: a weight is missing or not a positive number, or a column is named twice.
    """
    found: dict[str, float] = {}
    for word in column.split():
        name, colon, written = word.rpartition(":")
        if not colon or not name:
            raise ValueError(f"The column {word!r} in {column!r} has no weight: write {_WEIGHTS}.")
        try:
            weight = float(written)
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"The weight {written!r} in {column!r} is not a positive number: write {_WEIGHTS}.")
        if name in found:
            raise ValueError(f"The column {name!r} is given twice in {column!r}: give it once, with its whole weight.")
        found[name] = weight
    return tuple(found.items())


def possible_names(column: str) -> list[str]:
    """Lists every name that may be meant by a column's name, with weights or without."""
    words = [word.rpartition(":")[0] for word in column.split() if ":" in word]
    return [name for each in (column, *words) for name in each.split(";")]
