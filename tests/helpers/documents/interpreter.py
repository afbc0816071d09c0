"""Python that a document's blocks are typed into: a process of its own that starts at once, with one namespace."""

import linecache
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.helpers.programs import SERVER, start_fork


class Interpreter:
    """Executes pieces of a file's code, one after the other.

    Args:
        file: what a traceback calls the code.
        cwd: where it runs.
        environment: all its variables.
        log: file for what it prints.
    """

    def __init__(self, file: str, cwd: Path, environment: dict[str, str], log: Path):
        self.connection, theirs = SERVER.Pipe()
        self.process = SERVER.Process(target=_interpret, args=(theirs, file, (log, log), environment, cwd))
        self.process.start()
        theirs.close()

    def execute(self, code: str, line: int) -> str | None:
        """Executes code that begins at a line of the file; what went wrong, if anything did."""
        try:
            self.connection.send((code, line))
            return self.connection.recv()
        except (EOFError, BrokenPipeError):
            self.process.join()
            return f"the interpreter has ended with {self.process.exitcode}"

    def close(self) -> None:
        """Ends it."""
        self.connection.close()
        self.process.join(5)
        self.process.kill()


def _interpret(
    connection: Connection, file: str, outputs: tuple[Path, Path], environment: dict[str, str], cwd: Path
) -> None:
    start_fork(outputs, environment, cwd)
    sys.path.insert(0, "")
    sys.argv = [""]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    while True:
        try:
            code, line = connection.recv()
        except EOFError:
            return
        text = "\n" * (line - 1) + code
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        try:
            exec(compile(text, file, "exec"), namespace)
            connection.send(None)
        except (Exception, SystemExit):
            connection.send(traceback.format_exc())
