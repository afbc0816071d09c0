"""Parsers whose mistakes are one line: the option, what is wrong with it, and the nearest one that there is."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from flip_hf.console.endings import MISTAKE, end_with
from flip_hf.console.fields import CHOICES, JSON, RANGE, OptionError
from flip_hf.console.ranges import Range

# What argparse takes for an option, and is a number: -1e-5, -inf.
_NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)


def nearest(name: object, known: Iterable[str]) -> str:
    """A sentence that names the nearest of the known names, with a space before it; empty where none is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def boolean(text: str) -> bool:
    """Reads yes, no, true, false, 1 or 0, as argparse's type."""
    try:
        return string_to_bool(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}.") from None


class ScriptParser(argparse.ArgumentParser):
    """An `ArgumentParser` that ends with exit code 2 and one line, and abbreviates nothing.

    Numbers are declared as a [`Range`]: `type=integer(1)`. Of unknown options it names the nearest known one.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        # Its errors are raised, to be told in words of our own.
        super().__init__(*args, **{"allow_abbrev": False, "exit_on_error": False, **kwargs})

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        """Adds an argument; from the metadata of a field, its range becomes its type."""
        within, allowed = kwargs.pop(RANGE, None), kwargs.pop(CHOICES, ())
        kwargs.pop(JSON, None)
        if allowed:
            kwargs["choices"], kwargs["metavar"] = allowed, kwargs.get("metavar", str(names[0]).lstrip("-").upper())
        if within is not None:
            kwargs["type"] = within
        elif kwargs.get("type") is string_to_bool:
            kwargs["type"] = boolean
        if isinstance(kwargs.get("type"), Range):
            kwargs.setdefault("metavar", "N")
        return super().add_argument(*names, **kwargs)

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:  # pyright: ignore
        """Parses as `ArgumentParser` does, with negative numbers of any form."""
        try:
            return super().parse_known_args(self._marked(sys.argv[1:] if args is None else args), namespace)
        except argparse.ArgumentError as error:
            self.error(self._in_words(error))

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:  # pyright: ignore
        """Parses all arguments; an unknown one is an error."""
        found, rest = self.parse_known_args(args, namespace)
        self.refuse(rest)
        return found

    def refuse(self, rest: Sequence[str]) -> None:
        """Ends where arguments were left over."""
        if not rest:
            return
        word = next((each for each in rest if each.startswith("--")), None)
        if word is None:
            self.error(f"{rest[0]!r} belongs to no option.")
        name = word.split("=")[0]
        known = [each for action in self._actions for each in action.option_strings[:1]]
        self.error(f"there is no option {name}.{nearest('--' + name[2:].replace('-', '_'), known)}")

    def _marked(self, words: Iterable[str]) -> list[str]:
        """The words, with a space before negative numbers that argparse would take for options; Python's ignore it."""
        numeric = {name for action in self._actions if isinstance(action.type, Range) for name in action.option_strings}
        marked: list[str] = []
        of_numbers = False
        for word in words:
            if word.startswith("--"):
                of_numbers = word in numeric
            marked.append(f" {word}" if of_numbers and _NEGATIVE.match(word) else word)
        return marked

    def _in_words(self, error: argparse.ArgumentError) -> str:
        """The error in the words of the other checks, by the option's first name."""
        name, message = (error.argument_name or "").split("/")[0], error.message
        chosen = re.match(r"invalid choice: (.*) \(choose from (.*)\)$", message, re.DOTALL)
        if chosen is not None:
            message = f"is one of {chosen[2].replace(chr(39), '')}, got {chosen[1]}."
        message = re.sub(r"^expected (at least )?one argument$", "needs a value", message)
        return f"{name} {message}".strip()

    def error(self, message: str) -> NoReturn:
        """Ends with one line and exit code 2."""
        end_with(f"{_sentence(message)} `{self.prog} --help` lists the options.", code=MISTAKE)


def _sentence(message: str) -> str:
    return message if message.endswith((".", "?", "!")) else f"{message}."


class OptionsParser(ScriptParser, HfArgumentParser):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A parser of dataclasses made of `option`; its mistakes are [`OptionError`]s."""

    def parse(self, words: Sequence[str]) -> tuple[Any, ...]:
        """The dataclasses, filled from the command line's words.

        Raises:
            OptionError: an unknown option, or a value of another type or out of range.
        """
        namespace, rest = self.parse_known_args(list(words))
        self.refuse(rest)
        return self.parse_dict(vars(namespace))

    def error(self, message: str) -> NoReturn:
        """Raises an `OptionError` of one line."""
        raise OptionError(_sentence(message))
