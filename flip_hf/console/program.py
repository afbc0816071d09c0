"""The name of the console command, and how one of its lines is written."""

import shlex
from collections.abc import Sequence

PROGRAM = "flip-hf"


def command_line(command: str, words: Sequence[object] = ()) -> str:
    """The line that runs a subcommand with these words, as a shell takes it."""
    return shlex.join([PROGRAM, command, *map(str, words)])
