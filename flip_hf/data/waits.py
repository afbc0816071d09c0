"""Waits for data that a signal can end: a web server that says nothing must not stand between SIGTERM and a checkpoint.

A signal's handler cannot know whether the process computes, where it must not be interrupted, or waits, where it may.
Whoever waits says so with [`waiting`]; the handler calls [`end_waits`]. The state is the process's own: forked loader
workers take no stop signals (see workers.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager


class WaitEnded(BaseException):
    """A wait for data that a signal has ended; no `Exception`, or code on the way would take it for bad data."""


class _Waits:
    waiting = False
    ended = False


@contextmanager
def waiting() -> Iterator[None]:
    """Marks a wait for data.

    Raises:
        WaitEnded: [`end_waits`] was called, before or meanwhile.
    """
    _Waits.waiting = True
    try:
        if _Waits.ended:
            raise WaitEnded
        yield
    finally:
        _Waits.waiting = False


def end_waits() -> None:
    """Ends the wait under way and every later one; called by a signal's handler, in the main thread.

    Raises:
        WaitEnded: the process waits for data.
    """
    _Waits.ended = True
    if _Waits.waiting:
        _Waits.waiting = False  # once
        raise WaitEnded


def allow_waits() -> None:
    """Forgets [`end_waits`]."""
    _Waits.ended = False
