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


def alternate(steps: dict[str, Callable[[], None]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each step, the candidates taking turns, of which the first `warm_up` do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with tqdm(total=(repeats + warm_up) * len(steps), unit="step", file=sys.stderr) as bar:
        for turn in range(repeats + warm_up):
            for name, step in steps.items():
                bar.set_description(name)
                start = time.perf_counter()
                step()
                if turn >= warm_up:
                    seconds[name].append(time.perf_counter() - start)
                bar.update()
    return seconds


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
