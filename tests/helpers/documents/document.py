"""A document whose blocks are run, in order, in one workspace."""

import ast
import os
import re
import shlex
import subprocess
from pathlib import Path

from yaml import YAMLError

from flip_hf.training.recipes import RECIPES, parse_arguments
from tests.helpers.documents.blocks import (
    CONSOLE,
    PYTHON,
    RECIPE,
    SHELL,
    SHOWN,
    Block,
    Command,
    read_blocks,
    read_commands,
)
from tests.helpers.documents.commands import SCRIPTS, SYSTEM, check_not_run, inputs_of, program_of, reason_not_to_run
from tests.helpers.documents.interpreter import Interpreter
from tests.helpers.documents.prepared import HUB
from tests.helpers.documents.workspace import Workspace
from tests.helpers.hub_server import WRITER
from tests.helpers.programs import run_program

# Nothing is compiled: that takes longer than all the rest.
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}


class BlockError(AssertionError):
    """A block does not do what its document says; the message begins with `document:line`."""


class Document:
    """Runs blocks of a Markdown file.

    Args:
        path: the file.
        folder: an empty one to run in.
        trained: a folder as training leaves it.
        hub: address of a server that speaks the Hub's API.
    """

    def __init__(self, path: Path, folder: Path, trained: Path, hub: str):
        self.path = path
        self.hub = hub
        self.workspace = Workspace(folder, trained)
        self.log = folder.with_name(f"{folder.name}.txt")
        settings = {**os.environ, **ENVIRONMENT}
        self.interpreter = Interpreter(str(path), folder, settings, self.log)
        self.python_to_do = [block for block in read_blocks(path) if block.language == PYTHON]

    def run(self, block: Block) -> None:
        """Runs a block; of Python, those above it that have not run, too.

        Raises:
            BlockError: something went wrong, or its language is not known.
        """
        if block.language == PYTHON:
            while block in self.python_to_do:
                self._run_python(self.python_to_do.pop(0))
        elif block.language in (SHELL, CONSOLE):
            for command in _read_commands(block):
                self._run_command(command)
        elif block.language == RECIPE:
            self._read_recipe(block)
        elif block.language not in SHOWN:
            known = ", ".join((SHELL, CONSOLE, PYTHON, RECIPE, *SHOWN))
            raise BlockError(f"{block.place(-1)}: name the block's language, one of {known}; not {block.language!r}.")

    def close(self) -> None:
        """Ends the document's interpreter."""
        self.interpreter.close()

    def _run_python(self, block: Block) -> None:
        try:
            texts = [node.value for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Constant)]
            self.workspace.provide(text for text in texts if isinstance(text, str))
        except SyntaxError:
            pass  # the interpreter says where
        problem = self.interpreter.execute(block.text, block.line)
        if problem:
            lines = [int(line) for line in re.findall(rf'File "{re.escape(str(self.path))}", line (\d+)', problem)]
            raise BlockError(f"{block.place(lines[0] - block.line if lines else 0)}:\n{problem}")

    def _read_recipe(self, block: Block) -> None:
        printed = self.workspace.folder / "printed.yaml"
        printed.write_text(block.text, encoding="utf-8")
        try:
            parse_arguments([str(printed)], RECIPES, "shapes")
        except (ValueError, OSError, YAMLError) as error:
            raise BlockError(f"{block.place(0)}: {error}") from error

    def _run_command(self, command: Command) -> None:
        try:
            if reason_not_to_run(command.words):
                return check_not_run(command.words)
            if command.words[0] in SYSTEM:
                return self._run_of_system(command)
            script, argv = program_of(command.words)
            known = SCRIPTS[Path(script).name]
            self.workspace.provide(inputs_of(known, argv))
            added = known.smaller(argv, self.workspace.folder)
        except (ValueError, OSError) as error:
            raise BlockError(f"{command.place}: `{shlex.join(command.words)}`: {error}") from error
        argv = [*argv, *added]
        self.workspace.provide(inputs_of(known, argv))
        environment = {**ENVIRONMENT, **command.environment, HUB: self.hub, "HF_TOKEN": WRITER}
        done = run_program(script, *argv, environment=environment, cwd=self.workspace.folder, prepare=known.prepare)
        if done.returncode != 0:
            said = f"here with {shlex.join(added) or 'nothing'} added, ended with {done.returncode}"
            printed = f"{done.stdout[-500:]}\n{done.stderr[-3000:]}"
            raise BlockError(f"{command.place}: `{shlex.join(command.words)}`, {said}:\n{printed}")

    def _run_of_system(self, command: Command) -> None:
        done = subprocess.run(command.words, cwd=self.workspace.folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(done.stderr.strip())


def _read_commands(block: Block) -> list[Command]:
    try:
        return read_commands(block)
    except ValueError as error:
        raise BlockError(str(error)) from error
