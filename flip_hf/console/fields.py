"""Options as dataclass fields, with default, help, range and choices in one place; one function checks all."""

import copy
import dataclasses
import types
from dataclasses import field
from typing import Any, Union, get_args, get_origin, get_type_hints

from flip_hf.console.ranges import Range

# Keys of a field's metadata that are not argparse's.
RANGE = "range"
CHOICES = "allowed"
JSON = "json"


class OptionError(ValueError):
    """A mistake in an option; the message names the option and the fix. Scripts exit with 2, as argparse does."""


def require(condition: bool, message: str) -> None:
    """Raises an [`OptionError`] with the message unless the condition holds."""
    if not condition:
        raise OptionError(message)


def option(
    default: Any, help: str, within: Range | None = None, *, choices: tuple[str, ...] = (), json: bool = False
) -> Any:
    """Declares a dataclass field that is an option of the command line.

    Args:
        default: its default value.
        help: its text in `--help`.
        within: the allowed range of a number, or of each of several; required for numbers.
        choices: the allowed values of a text, or of each of several.
        json: the text is a JSON object, which a recipe may write as a mapping.
    """
    metadata = {"help": help, RANGE: within, CHOICES: choices, JSON: json}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def kind_of(hint: Any) -> tuple[type, bool, bool]:
    """Returns the type of an option's values, whether there are several, and whether it is optional."""
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        optional = type(None) in get_args(hint)
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is list:
        return get_args(hint)[0], True, optional
    return hint, False, optional


def complaint(declared: dataclasses.Field, kind: type, value: Any) -> str | None:
    """Describes what is wrong with one value of an option, without the option's name; None if nothing is."""
    within: Range | None = declared.metadata.get(RANGE)
    choices = declared.metadata.get(CHOICES) or ()
    if within is not None:
        return None if value in within else within.complaint(value)
    if kind is bool:
        return None if isinstance(value, bool) else f"must be true or false, got {value!r}."
    if not isinstance(value, str):
        return f"must be text, got {value!r}."
    if choices and value not in choices:
        return f"is one of {', '.join(choices)}, got {value!r}."
    return "must not hold a null character." if "\0" in value else None


def check_options(options: Any) -> None:
    """Checks every field of a dataclass of options against its type, its range and its choices.

    Raises:
        OptionError: a value is not allowed; the message names the option of the first one.
    """
    hints = get_type_hints(type(options))
    for declared in dataclasses.fields(options):
        value = getattr(options, declared.name)
        kind, several, optional = kind_of(hints[declared.name])
        if value is None:
            require(optional, f"--{declared.name} needs a value.")
            continue
        require(not several or isinstance(value, (list, tuple)), f"--{declared.name} takes a list, got {value!r}.")
        for each in value if several else [value]:
            fault = complaint(declared, kind, each)
            require(fault is None, f"--{declared.name} {fault}")
