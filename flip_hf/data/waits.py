"""Lets signals end waits for data: a silent web server must not stand between SIGTERM and a checkpoint.

A signal handler cannot know whether the process computes, which must not be interrupted, or waits, which may be. Code
that waits says so with [`waiting`]; the handler calls [`end_waits`]. The state belongs to the process: forked loader
workers ignore stop signals (see workers.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager


class WaitEnded(BaseException):
    """A signal ended a wait for data; not an `Exception`, which code in between would take for bad data."""


class _Waits:
    waiting = False
    ended = False


@contextmanager
def waiting() -> Iterator[None]:
    """Marks a wait for data.

    Raises:
        WaitEnded: [`end_waits`] was called before or during the wait.
    """
    _Waits.waiting = True
    try:
        if _Waits.ended:
            raise WaitEnded
        yield
    finally:
        _Waits.waiting = False


def end_waits() -> None:
    """Ends the current wait and every later one; called by a signal handler, in the main thread.

    Raises:
        WaitEnded: the process is waiting for data.
    """
    _Waits.ended = True
    if _Waits.waiting:
        _Waits.waiting = False  # once
        raise WaitEnded


def allow_waits() -> None:
    """Forgets [`end_waits`]."""
    _Waits.ended = False
