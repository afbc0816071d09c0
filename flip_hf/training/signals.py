"""SIGTERM and SIGINT: the first asks a run to save and leave after its step, the second ends it as ever."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

# torchrun passes a signal on to processes that Slurm has already sent it to: what follows the first one so closely is
# no second wish.
ECHO_SECONDS = 2.0


class StopSignals:
    """Takes SIGTERM and SIGINT while it is entered; outside the main thread, where Python cannot, it takes none.

    The first signal is noted. Another one, later than `ECHO_SECONDS`, does what it did before: it ends the process.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked loader worker that has not set its own handlers yet
        if self.received is None:
            self.received, self._first = signal.Signals(number).name, time.monotonic()
            # A handler may interrupt a print; only the bare write is safe here.
            os.write(2, f"\n{self.received}: saving after this step; once more ends it at once.\n".encode())
        elif time.monotonic() - self._first > ECHO_SECONDS:
            self.__exit__()
            signal.raise_signal(number)

    def stop_requested(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; every process must call it, once a step, and gets the same answer."""
        flag = self.received is not None
        if accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=accelerator.device)
        return accelerator.reduce(flags, "sum").item() > 0  # pyright: ignore[reportAttributeAccessIssue]
