"""Loader workers: how many there are, and how they take signals."""

import os
import signal
from types import FrameType


def cores_per_process() -> int:
    """Processor cores that each process of this machine may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_workers() -> int:
    """Loader workers of each process: the cores that are left, at most eight."""
    return min(8, cores_per_process() - 1)


def ignore_stop_signals(worker_id: int) -> None:
    """Makes a DataLoader's worker deaf to SIGINT and to the first SIGTERM (a `worker_init_fn`); the second ends it.

    Ctrl-C goes to the whole process group and Slurm signals every process of a step; a worker that died of it would
    end the run before it has saved. The training process tells its workers to leave through their queue, and sends
    SIGTERM, more than once, only to those that do not; where it was killed itself they notice.
    """
    received: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(0)
        received.append(number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, take)
