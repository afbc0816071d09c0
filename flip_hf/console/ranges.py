"""Ranges of the numbers that options take: they parse, check, and explain what is wrong."""

import argparse
import math
from dataclasses import dataclass
from typing import Any, TypeGuard

# Upper bound of counts: far above any run, and exact as a float.
MAX_COUNT = 10**15
# Characters of a value quoted in a message.
MAX_QUOTED = 80


def _written(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


@dataclass(frozen=True)
class Range:
    """The integers or numbers between two bounds, without NaN and infinity. As argparse's `type`, it parses one.

    Attributes:
        kind: `int`, or `float`, which includes integers.
        low: the lower bound.
        high: the upper bound; None for any finite number.
        open_low: whether `low` itself is excluded.
        open_high: whether `high` itself is excluded.
        says: the message about a value outside, with `{range}`.
        note: a reason or a fix, at the end of the message.
    """

    kind: type
    low: float
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    says: str = "must be {range}"
    note: str = ""

    def __contains__(self, value: object) -> bool:
        if not self._is_number(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        if self.high is None:
            return above
        return above and (value < self.high if self.open_high else value <= self.high)

    def _is_number(self, value: object) -> TypeGuard[float]:
        """Returns whether a value is a finite number of the kind; `True` is not."""
        if isinstance(value, bool) or not isinstance(value, (int, float) if self.kind is float else int):
            return False
        return isinstance(value, int) or math.isfinite(value)

    def _in_words(self) -> str:
        low = _written(self.low)
        high = None if self.high is None else _written(self.high)
        if high is None:
            return f"above {low}" if self.open_low else f"at least {low}"
        if not self.open_low and not self.open_high:
            return f"between {low} and {high}"
        if self.open_low and not self.open_high:
            return f"above {low} and at most {high}"
        return f"in {'(' if self.open_low else '['}{low}, {high})"

    def complaint(self, value: object) -> str:
        """Builds the message about a value outside the range, without the option's name."""
        words = self._in_words()
        if not self._is_number(value):
            noun = "an integer" if self.kind is int else "a number"
            words = f"{noun} of {words}" if words.startswith("at least") else f"{noun} {words}"
        said = self.says if self._is_number(value) else "must be {range}"
        got = value if isinstance(value, (int, float)) else repr(value)
        got = str(got) if len(str(got)) <= MAX_QUOTED else f"{str(got)[:MAX_QUOTED]}..."
        return f"{said.format(range=words)}, got {got}{f': {self.note}' if self.note else ''}."

    def __call__(self, text: str) -> float:
        """Parses a number of the command line.

        Raises:
            argparse.ArgumentTypeError: it is not a number of the kind, or out of range.
        """
        try:
            value = self.kind(text)
        except ValueError:  # also for more digits than Python parses
            raise argparse.ArgumentTypeError(self.complaint(text)) from None
        if value not in self:
            raise argparse.ArgumentTypeError(self.complaint(value))
        return value


def integer(low: int = 0, high: int | None = MAX_COUNT, **words: Any) -> Range:
    """Makes the range of integers between two bounds, both included."""
    return Range(int, low, high, **words)


def number(low: float = 0, high: float | None = None, **options: Any) -> Range:
    """Makes the range of numbers between two bounds; the options are those of [`Range`]."""
    return Range(float, low, high, **options)


# Ranges of many options.
POSITIVE = integer(1)
SEED = integer(0, 2**32 - 2**16, note="NumPy takes no others, and each process adds its rank")
FRACTION = number(0, 1, open_high=True)
