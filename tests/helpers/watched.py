"""Runs that a test watches, slowed down and in real processes, and a web server that stops answering."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.helpers.pretraining import PRETRAIN, TINY
from tests.helpers.programs import Program

# Seconds after which nothing of a failed run may be alive; loaded machines are slow, and it hung for ever before.
LIMIT = 60
SLOW = """
import os, runpy, sys, time
from flip_hf.training.engine import Trainer
step, seen = Trainer._step, []
def slowed(self, *batch):
    seen.append(self.state.samples)
    if os.environ.get("FAIL_AT") == str(len(seen)) and os.environ.get("FAIL_RANK", "0") == os.environ.get("RANK", "0"):
        raise RuntimeError("injected, as a full device is")
    time.sleep(float(os.environ.get("STEP_SECONDS", "0.02")))
    return step(self, *batch)
Trainer._step = slowed
if "FAIL_EVALUATION" in os.environ:
    from flip_hf.training import validation
    def failing(*features):
        raise RuntimeError("injected into the evaluation")
    validation.normalized = failing
sys.path.insert(0, os.path.dirname(os.environ["PRETRAIN"]))
runpy.run_path(os.environ["PRETRAIN"], run_name="__main__")
"""


def words(data: Path | str, out: Path, *more: str, workers: int = 1) -> list[str]:
    return [
        *("--train_data", str(data), "--output_dir", str(out), *TINY, "--precision", "fp32", "--batch_size", "8"),
        *("--train_samples", "400", "--log_samples", "8", "--checkpoint_samples", "16", "--shuffle_block", "6"),
        *("--num_workers", str(workers), "--report_to", "none", "--base_lr", "0.01", "--warmup_samples", "32", *more),
    ]


class Watched:
    """A slowed run in real processes: what it prints, and who belongs to it."""

    def __init__(self, tmp_path: Path, argv: list[str], processes: int = 1, **settings: str):
        self.out = tmp_path / "output.txt"
        self.out.touch()
        script = tmp_path / "slow.py"
        script.write_text(SLOW)
        environment = {"PRETRAIN": str(PRETRAIN), **settings}
        self.program = Program(script, argv, (self.out, self.out), processes, environment)
        self.log = Path(argv[argv.index("--output_dir") + 1]) / "log.jsonl"

    def text(self) -> str:
        return self.out.read_text()

    def steps(self) -> int:
        return self.log.read_text().count("loss") if self.log.exists() else 0

    def wait_for_steps(self, count: int) -> None:
        deadline = time.monotonic() + LIMIT
        while self.steps() < count:
            assert self.program.poll() is None and time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.01)

    def family(self) -> list[psutil.Process]:
        ranks = [psutil.Process(process.pid) for process in self.program.processes]
        return [*ranks, *(child for rank in ranks for child in rank.children(recursive=True))]

    def workers(self) -> list[psutil.Process]:
        return [child for process in self.program.processes for child in psutil.Process(process.pid).children()]

    def assert_all_end(self, family: list[psutil.Process]) -> int:
        """Waits until each process has ended by itself; the exit code of the run."""
        codes = []
        for process in self.program.processes:
            process.join(LIMIT)
            codes.append(process.exitcode)
        _, alive = psutil.wait_procs(family, timeout=10)
        alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        self.program.kill()
        assert None not in codes and not alive, self.text()[-3000:]
        return next(filter(None, codes), 0)

    def errors(self) -> list[str]:
        return [line for line in self.text().splitlines() if line.startswith("error: ")]


@contextlib.contextmanager
def serve(folder: Path, stops_after: Callable[[str], int | None]) -> Iterator[str]:
    """Serves a folder's files by HTTP on this machine, without ranges.

    Args:
        folder: the files.
        stops_after: bytes of a file after which the server says nothing more, with the connection open; None for none.

    Yields:
        The server's address.
    """
    ended = threading.Event()

    def answer(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            request = connection.recv(65536).decode(errors="replace")
            name = request.split()[1].strip("/") if request else ""
            content = (folder / name).read_bytes()
            head = (
                f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\nAccept-Ranges: none\r\nConnection: close\r\n\r\n"
            )
            connection.sendall(head.encode())
            if request.startswith("HEAD"):
                return
            limit = stops_after(name)
            connection.sendall(content[:limit])
            if limit is not None:
                ended.wait(600)

    def accept() -> None:
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ended.set()
        listener.close()
