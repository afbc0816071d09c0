"""Programs in processes of their own that need not import everything first.

Before a script's first line, Python takes seconds to import torch, Transformers and datasets. A fork server imports
them once in a session of tests, and each program here is a fork of it: a real process in a session of its own, with its
own output, exit code, signals and loader workers. What depends on how a process starts is not seen by it: launchers,
what the imports need, and the seed of `hash`, which all forks share. Tests of that start Python anew (`launch` in
tests/helpers/pretraining.py).
"""

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["flip_hf.training.build", "flip_hf.evaluation.command", "matplotlib.backends.backend_agg"]
)


class Program:
    """A script that runs as `python SCRIPT ARGV` does, or in several processes as under torchrun, on the CPU.

    Args:
        script: a file.
        argv: its arguments.
        outputs: files that stdout and stderr are appended to.
        processes: how many.
        environment: more variables than those of here.
        cwd: where it runs.
        prepare: called in each process before the script's first line.
    """

    def __init__(
        self,
        script: Path | str,
        argv: Sequence[str],
        outputs: tuple[Path, Path],
        processes: int = 1,
        environment: dict[str, str] | None = None,
        cwd: Path = ROOT,
        prepare: Callable[[], None] | None = None,
    ):
        settings = {**os.environ, "ACCELERATE_USE_CPU": "true", **(environment or {})}
        ranks = _ranks(processes) if processes > 1 else [{}]
        calls = [(script, argv, outputs, {**settings, **rank}, cwd, prepare) for rank in ranks]
        self.processes = [SERVER.Process(target=_become, args=call) for call in calls]
        for process in self.processes:
            process.start()

    def poll(self) -> int | None:
        """The exit code, if all have ended."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code: 0, or that of a process that failed; it then ends the others, as torchrun does."""
        while running := [process.sentinel for process in self.processes if process.exitcode is None]:
            if not wait(running, timeout):
                raise TimeoutError(f"The program still runs after {timeout} seconds.")
            if any(process.exitcode for process in self.processes):
                self.kill()
        return self.poll() or 0

    def kill(self) -> None:
        """Ends all processes and their workers at once."""
        for process in self.processes:
            with suppress(ProcessLookupError):  # where it has ended, or has not yet a group of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process in self.processes:
            process.join()


def run_program(script: Path | str, *argv: object, processes: int = 1, **options) -> subprocess.CompletedProcess:
    """Runs a [`Program`] to its end; the result is that of `subprocess.run` with captured text."""
    arguments = [str(argument) for argument in argv]
    with TemporaryDirectory() as folder:
        outputs = (Path(folder) / "stdout", Path(folder) / "stderr")
        for path in outputs:
            path.touch()
        program = Program(script, arguments, outputs, processes, **options)
        try:
            code = program.wait()
        finally:
            program.kill()
        return subprocess.CompletedProcess([str(script), *arguments], code, *(path.read_text() for path in outputs))


def _ranks(processes: int) -> list[dict[str, str]]:
    """The variables that torchrun sets for each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def start_fork(outputs: tuple[Path, Path], environment: dict[str, str], cwd: Path) -> None:
    """Makes this fork of the server a process of its own: its session, output, folder and variables."""
    gc.freeze()  # what all forks share is no garbage, and is copied where a collection touches it
    multiprocessing.set_start_method(None, force=True)  # of its own workers: the usual one again
    os.setsid()
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)


def _become(
    script: Path | str,
    argv: Sequence[str],
    outputs: tuple[Path, Path],
    environment: dict[str, str],
    cwd: Path,
    prepare: Callable[[], None] | None,
) -> None:
    """The whole life of a fork."""
    start_fork(outputs, environment, cwd)
    sys.argv = [str(script), *argv]
    sys.path.insert(0, str(Path(script).resolve().parent))
    if prepare is not None:
        prepare()
    runpy.run_path(str(script), run_name="__main__")
