"""SIGTERM and SIGINT: the first makes a run save and leave before its next step, the second ends it as usual."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import torch.multiprocessing

from flip_hf.data.waits import allow_waits, end_waits

# torchrun forwards a signal to processes that already got it from Slurm: a second one within this time is an echo.
ECHO_SECONDS = 2.0


class StopSignals:
    """Handles SIGTERM and SIGINT while entered; outside the main thread, where Python cannot, it handles none.

    The first signal is recorded, and ends a wait for data (see `data/waits.py`). Another one, later than
    `ECHO_SECONDS`, has its previous effect: it ends the process.

    Attributes:
        received: the first signal's name; None before it.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._first = 0.0
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}
        self._process = os.getpid()

    def __enter__(self) -> "StopSignals":
        allow_waits()
        _stop_with_launcher()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        allow_waits()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked loader worker that has not set its own handlers yet
        if self.received is None:
            self.received = signal.Signals(number).name
            self._first = time.monotonic()
            # A handler may interrupt a print; only the bare write is safe here.
            os.write(2, f"\n{self.received}: saving after this step; send it again to end at once.\n".encode())
            end_waits()
        elif time.monotonic() - self._first > ECHO_SECONDS:
            self.__exit__()
            signal.raise_signal(number)


def _stop_with_launcher() -> None:
    """Asks the kernel for a SIGTERM when torchrun is killed; its processes would otherwise keep training."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)  # pyright: ignore[reportAttributeAccessIssue]
