"""Options as dataclass fields, with default, help, range and choices in one place; one function checks all."""

import copy
import dataclasses
import types
from dataclasses import field
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from flip_hf.console.ranges import Range

# Keys of a field's metadata that are not argparse's.
RANGE = "range"
JSON = "json"


class OptionError(ValueError):
    """A mistake in an option; the message names the option and the fix. Scripts exit with 2, as argparse does."""


def require(condition: bool, message: str) -> None:
    """Raises an [`OptionError`] with the message unless the condition holds."""
    if not condition:
        raise OptionError(message)


def option(default: object, help: str, within: Range | None = None, *, json: bool = False) -> Any:
    """Declares a dataclass field that is an option of the command line; a choice is one of type `Literal`.

    Args:
        default: its default value.
        help: its text in `--help`.
        within: the allowed range of a number, or of each of several; required for numbers.
        json: the text is a JSON object, or a list of them, which a recipe may write as a mapping or as a list of them.
    """
    metadata = {"help": help, RANGE: within, JSON: json}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Kind(NamedTuple):
    """Facts that the type of an option's field tells.

    Attributes:
        value: the type of one value.
        several: whether there are several.
        optional: whether it may be absent.
        choices: the allowed values of a text; empty where all are.
    """

    value: type
    several: bool
    optional: bool
    choices: tuple[str, ...]


def kind_of(hint: Any) -> Kind:
    """Reads the type of an option's field: of values or a `Literal` of texts, several as a list, optional with None."""
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        optional = type(None) in get_args(hint)
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    several = get_origin(hint) is list
    if several:
        (hint,) = get_args(hint)
    if get_origin(hint) is Literal:
        return Kind(str, several, optional, get_args(hint))
    return Kind(hint, several, optional, ())


def complaint(declared: dataclasses.Field, kind: Kind, value: object) -> str | None:
    """Describes what is wrong with one value of an option, without the option's name; None if nothing is."""
    within: Range | None = declared.metadata.get(RANGE)
    if within is not None:
        return None if value in within else within.complaint(value)
    if kind.value is bool:
        return None if isinstance(value, bool) else f"must be true or false, got {value!r}."
    if not isinstance(value, str):
        return f"must be text, got {value!r}."
    if kind.choices and value not in kind.choices:
        return f"is one of {', '.join(kind.choices)}, got {value!r}."
    return "must not hold a null character." if "\0" in value else None


def check_options(options: Any) -> None:
    """Checks every field of a dataclass of options against its type, its range and its choices.

    Raises:
        OptionError: a value is not allowed; the message names the option of the first one.
    """
    hints = get_type_hints(type(options))
    for declared in dataclasses.fields(options):
        value = getattr(options, declared.name)
        kind = kind_of(hints[declared.name])
        if value is None:
            require(kind.optional, f"--{declared.name} needs a value.")
            continue
        require(not kind.several or isinstance(value, (list, tuple)), f"--{declared.name} takes a list, got {value!r}.")
        for each in value if kind.several else [value]:
            fault = complaint(declared, kind, each)
            require(fault is None, f"--{declared.name} {fault}")
