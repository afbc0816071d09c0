"""Parsers with one-line errors: the option, what is wrong with it, and the nearest known option."""

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NoReturn, get_type_hints

from flip_hf.console.counterparts import counterpart
from flip_hf.console.endings import MISTAKE, end_with
from flip_hf.console.fields import RANGE, OptionError, kind_of
from flip_hf.console.ranges import Range

# Numbers that argparse takes for options: -1e-5, -inf.
_NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)


# Spellings of yes and no.
_BOOLEANS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


def nearest(name: object, known: Iterable[str]) -> str:
    """Suggests the known name that is meant, in a sentence with a leading space; empty where none is near.

    That is what an option of another program is called here, or a name that begins so, or the nearest. Dashes before
    names are not compared: they would bring short ones near to each other.
    """
    known = list(known)
    elsewhere = counterpart(str(name), known)
    if elsewhere:
        return elsewhere
    word = str(name).lstrip("-")
    bare = {each.lstrip("-"): each for each in known}
    longer = [each for each in bare if len(word) > 1 and each.startswith(word)]  # abbreviated: --arch
    close = longer[:1] or difflib.get_close_matches(word, bare, n=1)
    return f" Did you mean {bare[close[0]]!r}?" if close else ""


def boolean(text: str) -> bool:
    """Parses yes, no, true, false, 1 or 0, as an argparse type."""
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}.") from None


class ScriptParser(argparse.ArgumentParser):
    """An `ArgumentParser` that exits with code 2 and one line, and allows no abbreviations.

    Numbers are declared as a [`Range`]: `type=integer(1)`. Options may be written with dashes for their underscores,
    and for an unknown one it suggests the nearest.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        # Errors are raised, to be reworded.
        super().__init__(*args, **{"allow_abbrev": False, "exit_on_error": False, **kwargs})

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        """Adds an argument, as `ArgumentParser` does."""
        if isinstance(kwargs.get("type"), Range):
            kwargs.setdefault("metavar", "N")
        return super().add_argument(*names, **kwargs)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parses as `ArgumentParser` does, and takes all forms of negative numbers and dashes in names of options."""
        try:
            return super().parse_known_args(self._marked(sys.argv[1:] if args is None else args), namespace)
        except argparse.ArgumentError as error:
            self.error(self._in_words(error))

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parses all arguments; an unknown one is an error."""
        found, rest = self.parse_known_args(args, namespace)
        self.refuse(rest)
        return found

    def refuse(self, rest: Sequence[str]) -> None:
        """Ends with an error if arguments are left over."""
        if not rest:
            return
        word = next((each for each in rest if each.startswith("--")), None)
        if word is None:
            before = f" {self.first} comes before all options." if self.first else ""
            self.error(f"{rest[0]!r} belongs to no option.{before}")
        name = word.split("=")[0]
        self.error(f"there is no option {name}.{nearest('--' + name[2:].replace('-', '_'), self.names())}")

    @property
    def first(self) -> str:
        """The placeholder of the argument before all options; empty where there is none."""
        return ""

    def names(self) -> list[str]:
        """Lists the options' names, with dashes, including those of sub-commands."""
        found = [each for action in self._actions for each in action.option_strings if each.startswith("--")]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [name for parser in action.choices.values() for name in parser.names()]
        return list(dict.fromkeys(found))

    def _marked(self, words: Iterable[str]) -> list[str]:
        """Rewrites the words for argparse.

        Names of options get underscores; negative numbers that would be taken for options get a leading space, which
        Python's parsing of numbers ignores.
        """
        known = set(self.names())
        numeric = {name for action in self._actions if isinstance(action.type, Range) for name in action.option_strings}
        marked: list[str] = []
        of_numbers = False
        for word in words:
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                spelled = f"--{name[2:].replace('-', '_')}"
                word = f"{spelled}{equals}{value}" if name not in known and spelled in known else word
                of_numbers = word in numeric
            marked.append(f" {word}" if of_numbers and _NEGATIVE.match(word) else word)
        return marked

    def _in_words(self, error: argparse.ArgumentError) -> str:
        """Rewords the error like the other checks, with the option's first name."""
        name = (error.argument_name or "").split("/")[0]
        message = error.message
        chosen = re.match(r"invalid choice: (.*) \(choose from (.*)\)$", message, re.DOTALL)
        if chosen is not None:
            message = f"is one of {chosen[2].replace(chr(39), '')}, got {chosen[1]}."
        message = re.sub(r"^expected (at least )?one argument$", "needs a value", message)
        return f"{name} {message}".strip()

    def error(self, message: str) -> NoReturn:
        """Exits with one line and code 2."""
        end_with(f"{_sentence(message)} `{self.prog} --help` lists the options.", code=MISTAKE)


def _sentence(message: str) -> str:
    return message if message.endswith((".", "?", "!")) else f"{message}."


@dataclasses.dataclass(frozen=True)
class Heading:
    """A part of `--help`.

    Attributes:
        title, about: what stands above it.
        options: names of the options below it, in order.
    """

    title: str
    about: str
    options: tuple[str, ...]


def heading_of(group: type, without: Collection[str] = ()) -> Heading:
    """The heading of a dataclass of options: its name, its docstring's first paragraph and its fields but some."""
    title = re.sub(r"(Arguments|Options)$", "", group.__name__).lower()
    about = (inspect.getdoc(group) or "").split("\n\n")[0]
    names = tuple(field.name for field in dataclasses.fields(group) if field.name not in without)
    return Heading(title, " ".join(about.split()), names)


class OptionsParser(ScriptParser):
    """A parser of dataclasses made of `option`; its mistakes are [`OptionError`]s.

    Args:
        groups: the dataclasses.
        headings: of `--help`, each option below one of them; one heading a dataclass if None.
        more_options: names of options that a command parses itself, for hints.
        kwargs: of `ArgumentParser`.
    """

    def __init__(
        self,
        groups: Sequence[type],
        headings: Sequence[Heading] | None = None,
        more_options: Sequence[str] = (),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self._more_options = tuple(more_options)
        self._dataclasses = tuple(groups)
        declared = {field.name: (group, field) for group in groups for field in dataclasses.fields(group)}
        for heading in headings or [heading_of(group) for group in groups]:
            section = self.add_argument_group(heading.title, heading.about)
            for name in heading.options:
                group, field = declared[name]
                _add_option(section, field, get_type_hints(group)[name])

    @property
    def first(self) -> str:
        """The placeholder of the argument before the options."""
        found = re.search(r"\b(RECIPE|MODEL)\b", self.usage or "")
        return found[0] if found else ""

    def names(self) -> list[str]:
        """Lists the options' names, and those that a script parses itself."""
        return [*super().names(), *self._more_options]

    def parse(self, words: Sequence[str]) -> tuple[Any, ...]:
        """Parses the command line's words into the dataclasses.

        Raises:
            OptionError: an option is unknown, or a value has another type or is out of range.
        """
        namespace, rest = self.parse_known_args(list(words))
        self.refuse(rest)
        given = vars(namespace)
        return tuple(
            group(**{field.name: given[field.name] for field in dataclasses.fields(group) if field.name in given})
            for group in self._dataclasses
        )

    def error(self, message: str) -> NoReturn:
        """Raises an [`OptionError`] of one line."""
        raise OptionError(_sentence(message))


def _add_option(section: argparse._ArgumentGroup, field: dataclasses.Field, hint: Any) -> None:
    """Adds a field's option to a group of a parser; a switch that is on by default also gets a `--no_` form."""
    kind = kind_of(hint)
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()  # pyright: ignore[reportCallIssue]
    # Options that are not given stay out of the namespace: the dataclass has the default.
    shared: dict[str, Any] = {
        "dest": field.name,
        "default": argparse.SUPPRESS,
        "help": _help(field.metadata["help"], default),
    }
    if kind.value is bool:
        section.add_argument(f"--{field.name}", nargs="?", const=True, type=boolean, metavar="BOOL", **shared)
        if default is True:
            turned_off = {**shared, "help": f"the same as --{field.name} false"}
            section.add_argument(f"--no_{field.name}", action="store_false", **turned_off)
        return
    within = field.metadata[RANGE]
    if within is not None:
        typed = {"type": within, "metavar": "N"}
    elif kind.choices and not kind.several:
        typed = {"type": kind.value, "choices": kind.choices, "metavar": f"{{{','.join(kind.choices)}}}"}
    else:
        typed = {"type": kind.value, "choices": kind.choices or None, "metavar": "TEXT"}
    section.add_argument(f"--{field.name}", nargs="+" if kind.several else None, **typed, **shared)


def _help(text: str, default: object) -> str:
    """Builds the text of an option in `--help`: its help, and the default if there is one."""
    if default is not None and default is not False and default != []:
        values = default if isinstance(default, list) else [default]
        text = f"{text} (default: {' '.join(str(value) for value in values)})"
    return text.replace("%", "%%")
