"""The shares of a sample's time in the loader, by what the time is spent on.

The loader runs in this process under Python's profiler, which slows calls of Python functions, not the libraries that
decode, resize and copy: shares of the rest are upper bounds.
"""

import cProfile
import pstats
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from flip_hf.data.plain_jpeg import PlainJpeg
from flip_hf.data.rendering import load
from flip_hf.data.tar import TarShards
from flip_hf.data.transforms import resize
from flip_hf.training.packing import Tokenize
from flip_hf.training.patches import cut_bytes

# None of them calls another.
PARTS: dict[str, tuple[Any, ...]] = {
    "decoding JPEGs": (PlainJpeg.pixels, load),
    "resizing crops": (resize,),
    "cutting patches": (cut_bytes,),
    "tokenizing and packing texts": (Tokenize.__call__,),
    "reading shards": (TarShards.read,),
}
REST = "the rest"


def shares_of_time(batches: Iterator[Any], count: int) -> dict[str, float]:
    """Returns the share of each of `PARTS`, and of the rest, in the time of `count` batches made in this process."""
    next(batches)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(count):
        next(batches)
    profile.disable()
    stats: Any = pstats.Stats(profile)
    shares = {
        part: sum(_cumulative(stats.stats, function) for function in functions) / stats.total_tt
        for part, functions in PARTS.items()
    }
    return {**shares, REST: 1 - sum(shares.values())}


def _cumulative(stats: dict[tuple, tuple], function: FunctionType) -> float:
    """Returns the seconds spent in a function and what it calls; 0 if it was not called."""
    code = function.__code__
    return stats.get((code.co_filename, code.co_firstlineno, code.co_name), (0, 0, 0.0, 0.0))[3]


def shares_markdown(shares: dict[str, float], candidate: str) -> str:
    """Makes a table of shares."""
    lines = [
        f"Where the time of a sample goes, {candidate}, under Python's profiler, which slows Python and not the "
        "libraries: the share of the rest is an upper bound.",
        "| part | share of the time |",
        "|---|---|",
        *(f"| {part} | {share:.0%} |" for part, share in shares.items()),
    ]
    return "\n".join(lines) + "\n"
