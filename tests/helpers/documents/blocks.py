"""The fenced blocks of a Markdown file, and the commands of a shell block."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from tests.helpers.programs import ROOT

SHELL = "bash"
CONSOLE = "console"
PYTHON = "python"
RECIPE = "yaml"
# What is shown and not run: trees of files, output, references.
SHOWN = ("text", "bibtex")


@dataclass(frozen=True)
class Block:
    """The text between two fences.

    Attributes:
        path: of the document.
        line: number of its first line of text.
        language: the word behind the opening fence.
        text: without the fences and their indentation.
    """

    path: Path
    line: int
    language: str
    text: str

    def place(self, line: int) -> str:
        """`document:line`, of a line counted from 0 within the block."""
        path = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path.name
        return f"{path}:{self.line + line}"


@dataclass(frozen=True)
class Command:
    """A command of a shell block.

    Attributes:
        place: `document:line` of its first line.
        environment: variables set before it.
        words: as the shell hands them over.
    """

    place: str
    environment: dict[str, str]
    words: list[str]


def read_blocks(path: Path) -> list[Block]:
    """All fenced blocks, in order.

    Raises:
        ValueError: a block that does not end.
    """
    blocks: list[Block] = []
    # Of the block that is open.
    opening = 0
    fence = ""
    language = ""
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        opens = re.match(r"\s*(```+|~~~+)\s*(\w*)", line)
        if not opening and opens:
            opening = number
            fence, language = opens.groups()
            lines = []
        elif opening and line.strip() == fence:
            blocks.append(Block(path, opening + 1, language, dedent("\n".join(lines)) + "\n"))
            opening = 0
        else:
            lines.append(line)
    if opening:
        raise ValueError(f"{path.name}:{opening}: the block does not end.")
    return blocks


def read_commands(block: Block) -> list[Command]:
    """The commands of a block of `bash`; of a block of `console`, those behind `$ `, between what they print.

    Raises:
        ValueError: shell syntax other than words, comments, variables, `&&` and `;`; a console without a command.
    """
    found: list[tuple[int, str]] = []  # number and text
    continues = False
    for number, line in enumerate(block.text.splitlines()):
        if continues:
            found[-1] = (found[-1][0], found[-1][1].removesuffix("\\") + line)
        elif block.language == SHELL or line.startswith("$ "):
            found.append((number, line.removeprefix("$ ") if block.language == CONSOLE else line))
        else:
            continue
        continues = line.endswith("\\")
    if not found:
        raise ValueError(f"{block.place(0)}: no line begins with `$ `; call output that stands alone text.")
    places = [(block.place(number), line) for number, line in found]
    return [_command(place, words) for place, line in places for words in _split(line, place)]


def _split(line: str, place: str) -> list[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|<>")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    try:
        words = list(lexer)
    except ValueError as error:
        raise ValueError(f"{place}: {error}.") from error
    for word in words:
        if word in ("&&", ";"):
            parts.append([])
        elif set(word) <= set("&;|<>"):
            raise ValueError(f"{place}: these tests do not know the shell's {word!r}.")
        else:
            parts[-1].append(word)
    return [words for words in parts if words]


def _command(place: str, words: list[str]) -> Command:
    count = next((i for i, word in enumerate(words) if not re.match(r"[A-Z][A-Z0-9_]*=", word)), len(words))
    return Command(place, dict(word.split("=", 1) for word in words[:count]), words[count:])
