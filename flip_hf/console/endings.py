"""The end of a script that cannot continue: one line that names the mistake and the fix, and an exit code."""

import re
import sys
from typing import NoReturn

from flip_hf.console.fields import OptionError

# Exit codes: for mistakes in the command line, as argparse's, and for everything else.
MISTAKE = 2
FAILURE = 1
# As a shell counts a program that SIGINT has ended.
INTERRUPTED = 130
# Characters of a message, which may quote a whole file.
MAX_MESSAGE = 2000

# The part of a strict configuration's error that names its internal function.
_STRICT = re.compile(r"(?:Class v|V)alidation error for (?:validator|field) '\w+':\s+\w+Error: ")


class Ended(SystemExit):
    """The exit of a script, with the line that it printed."""

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code


def one_line(message: object) -> str:
    """Removes line breaks and control characters from a message: they may come from data and drive a terminal."""
    text = _STRICT.sub("", str(message))
    if len(text) > MAX_MESSAGE:
        text = f"{text[:MAX_MESSAGE]} ..."
    text = " ".join(text.split())
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def end_with(error: object, code: int | None = None) -> NoReturn:
    """Prints `error: ` and the message in one line, and exits: with 2 for a mistake in the options, else with 1.

    Raises:
        Ended: always.
    """
    if code is None:
        code = MISTAKE if isinstance(error, OptionError) else FAILURE
    line = f"error: {one_line(error) or type(error).__name__}"
    print(line, file=sys.stderr, flush=True)
    raise Ended(line, code)
