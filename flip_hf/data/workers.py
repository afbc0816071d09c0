"""Manages loader workers: their number, their signal handling, and their end, whatever happened."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import connection, util
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeVar

import torch.multiprocessing

from flip_hf.data.waits import waiting

T = TypeVar("T")

# Seconds in which all workers together must end by themselves.
GRACE_SECONDS = 5.0


def cores_per_process() -> int:
    """Returns the number of processor cores that each process of this machine may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_workers() -> int:
    """Returns the default number of loader workers of a process: the remaining cores, at most eight."""
    return min(8, cores_per_process() - 1)


def start_worker(worker_id: int) -> None:
    """Makes a DataLoader's worker ignore SIGINT and the first SIGTERM (a `worker_init_fn`); the second ends it.

    Ctrl-C goes to the whole process group and Slurm signals every process of a step; a worker that died of it would
    end the run before it has saved. The training process asks its workers to exit through their queue and kills those
    that do not (see [`open_batches`]); if it was killed itself, the kernel kills them.
    """
    received: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(0)
        received.append(number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, take)
    if sys.platform == "linux":
        # A worker that reads from a silent server would not notice that its parent process is gone.
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def open_batches(loader: Iterable[T]) -> Iterator[Iterator[T]]:
    """Opens an iterator over a DataLoader's batches, whose workers end with the block, however it ends.

    A signal can end each wait for a batch (see waits.py). Garbage collection would not suffice: the traceback of an
    error keeps the iterator alive, and the process would wait at its exit for workers that nobody has asked to leave.

    Raises:
        WaitEnded: a signal ended a wait.
    """
    _end_with(os.getpid())
    iterator = iter(loader)
    try:
        yield _waited_for(iterator)
    finally:
        _shut_down(iterator)


def _waited_for(iterator: Iterator[T]) -> Iterator[T]:
    while True:
        with waiting():
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (EOFError, OSError) as error:  # a worker that dies while it hands over a batch breaks a connection
                ended = _ended_workers(iterator)
                if not ended:
                    raise
                # As torch says it where it notices first.
                raise RuntimeError(f"DataLoader worker (pid(s) {ended[0]}) exited unexpectedly") from error
        yield batch


def _ended_workers(iterator: Any) -> list[int]:
    """Returns the process numbers of the workers of a DataLoader's iterator that have ended, or do within a second."""
    running = {worker.sentinel: worker.pid for worker in getattr(iterator, "_workers", [])}
    return [running[ended] for ended in connection.wait(list(running), timeout=1)] if running else []


def _shut_down(iterator: Any) -> None:
    """Asks the workers of a DataLoader's iterator to exit, and kills those still alive after `GRACE_SECONDS`."""
    workers = getattr(iterator, "_workers", [])
    if not workers:
        return
    if sys.is_finalizing():  # the iterator was left to the interpreter's end, where no thread can start any more
        _kill(workers)
        return
    timer = threading.Timer(GRACE_SECONDS, _kill, (workers,))
    timer.daemon = True
    timer.start()
    with suppress(RuntimeError):  # raised by torch, in the middle of this, for a worker that was killed
        iterator._shutdown_workers()
    timer.cancel()
    _kill(workers)


def _kill(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()


@cache
def _end_with(process: int) -> None:
    """Makes workers end with this process, whose number is given: what another has registered is not run at its end."""
    # Before anything else that `multiprocessing` does when a process exits.
    util.Finalize(None, _kill_at_exit, exitpriority=1000)


def _kill_at_exit() -> None:
    """Kills the children to which `multiprocessing` would send one SIGTERM and then join them without a time limit."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a worker that was killed
    _kill(child for child in multiprocessing.active_children() if child.daemon)
