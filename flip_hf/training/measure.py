"""The time that a run takes, and how much of it is waiting for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Window:
    """The time between two log lines.

    Args:
        samples, steps: counts when it begins.
    """

    def __init__(self, samples: int, steps: int):
        self._begin(samples, steps)

    def _begin(self, samples: int, steps: int) -> None:
        self._start = time.perf_counter()
        self._samples = samples
        self._steps = steps
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside: evaluation is not training."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def close(self, samples: int, steps: int) -> dict[str, float]:
        """Ends the window and begins the next.

        Returns:
            Its `seconds`; `samples_per_second` over all processes; `step_seconds`, the mean per step; `data_wait`, the
            share of the time, from 0 to 1, that this process waited for data, including the start of its workers.
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)
        values = {
            "seconds": seconds,
            "samples_per_second": (samples - self._samples) / seconds,
            "step_seconds": seconds / max(1, steps - self._steps),
            "data_wait": self._waited / seconds,
        }
        self._begin(samples, steps)
        return values
