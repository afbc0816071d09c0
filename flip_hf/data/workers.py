"""How loader workers take signals: a run that is asked to stop needs them until its last step."""

import os
import signal
from types import FrameType


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
