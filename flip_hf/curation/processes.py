"""Spreads a pass over data across worker processes, which end with it however it ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from flip_hf.data.loader import make_loader
from flip_hf.data.reading import Reader
from flip_hf.data.workers import open_batches


class WorkFailed(RuntimeError):
    """A worker cannot continue; the message says why."""


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt, as SIGINT does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def this_worker() -> Reader:
    """Returns the place of this worker process among all; the main process is the only one where there are none."""
    info = get_worker_info()
    return Reader(info.id, info.num_workers) if info else Reader(0, 1)


def run_in_workers(work: IterableDataset, workers: int) -> Iterator[Any]:
    """Yields what worker processes yield, in the order of its arrival.

    Args:
        work: iterated in every worker, where it does the part of [`this_worker`]. A worker that cannot continue yields
            `{"error": message}` last, as an exception would arrive as a page of traceback.
        workers: number of processes; 0 does the work in this one.

    Raises:
        WorkFailed: a worker could not continue.
    """
    # Not in order, so that a worker that waits for a web server holds up no other.
    loader = make_loader(work, num_workers=workers, collate_fn=_unchanged, in_order=False)
    try:
        with open_batches(loader) as items:
            for item in items:
                if isinstance(item, dict) and "error" in item:
                    raise WorkFailed(item["error"])
                yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        said = str(error).splitlines()[0].rstrip(". ")
        raise WorkFailed(f"A worker process ended: {said}. If memory is short, give fewer --workers.") from error


def _unchanged(item: Any) -> Any:
    return item
