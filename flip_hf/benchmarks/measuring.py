"""The parts that all questions share: the alternating measurement, and the hardware and versions of a result."""

import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import transformers
from tqdm import tqdm

from flip_hf.training.hardware import device_name


def alternate(
    steps: dict[str, Callable[[], None]], repeats: int, warm_up: int = 1, too_large: set[str] | None = None
) -> dict[str, list[float]]:
    """Seconds of each step, the candidates taking turns, of which the first `warm_up` do not count.

    Args:
        steps: the candidates' steps, by name; each waits for its device.
        repeats: turns that count.
        warm_up: turns before them.
        too_large: gets the names of steps that a GPU's memory is too small for, which then have no seconds; without it
            the first of them ends the measurement.

    Raises:
        torch.OutOfMemoryError: a GPU's memory is too small.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with tqdm(total=(repeats + warm_up) * len(steps), unit="step", file=sys.stderr) as bar:
        for turn in range(repeats + warm_up):
            for name, step in steps.items():
                bar.set_description(name)
                if too_large is None or name not in too_large:
                    taken = _seconds(step, name, too_large)
                    seconds[name] += [taken] if turn >= warm_up else []
                bar.update()
    return {name: [] if too_large and name in too_large else taken for name, taken in seconds.items()}


def _seconds(step: Callable[[], None], name: str, too_large: set[str] | None) -> float:
    start = time.perf_counter()
    try:
        step()
    except torch.OutOfMemoryError:
        if too_large is None:
            raise
        too_large.add(name)
    if too_large and name in too_large:
        torch.cuda.empty_cache()  # here the error, whose traceback holds the step's tensors, is gone
    return time.perf_counter() - start


def announce_compilation(graphs: int) -> None:
    """Says before a measurement how many graphs it compiles: the bar stands still meanwhile."""
    print(
        f"torch.compile makes {graphs} graphs, one for each compiled candidate and mask ratio, in the first turn. On a "
        "CPU, where it calls a C++ compiler for each kernel, a graph takes minutes, even that of a toy.",
        file=sys.stderr,
    )


def spread(values: Sequence[float], form: str) -> str:
    """Writes the median of values with their minimum and maximum, as `0.123 (0.120 - 0.130)` in the form `.3f`."""
    low, middle, high = (format(f(values), form) for f in (min, statistics.median, max))
    return f"{middle} ({low} - {high})"


def environment(device: str) -> dict:
    """Describes the hardware and the versions that a figure depends on."""
    return {
        "hardware": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def about(result: dict, runs: int) -> str:
    """On what, by which command and in how many runs of each candidate a result was measured."""
    return (
        f"{result['hardware']}; {result['threads']} threads, torch {result['torch']}, transformers "
        f"{result['transformers']}. Medians of {runs} alternating runs.\n\n"
        f"`{result['command']}`\n"
    )
