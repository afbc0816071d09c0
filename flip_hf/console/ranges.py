"""The numbers that an option takes, in one object: it parses them, checks them, and says what is wrong."""

import argparse
import math
from dataclasses import dataclass
from typing import Any

# Of a count: far above any run, and exactly represented as a float.
MAX_COUNT = 10**15
# Characters of a value in a message.
MAX_QUOTED = 80


def _written(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


@dataclass(frozen=True)
class Range:
    """The integers or numbers between two bounds; never NaN or infinity. As argparse's `type`, it reads one from text.

    Attributes:
        kind: `int`, or `float`, which integers are, too.
        low: the least of them.
        high: the greatest of them; None for any finite number.
        open_low: whether `low` itself is excluded.
        open_high: whether `high` itself is excluded.
        says: the message about another value, with `{range}`.
        note: a reason or a mend, which ends the message.
    """

    kind: type
    low: float
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    says: str = "must be {range}"
    note: str = ""

    def __contains__(self, value: Any) -> bool:
        if not self._is_number(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        if self.high is None:
            return above
        return above and (value < self.high if self.open_high else value <= self.high)

    def _is_number(self, value: Any) -> bool:
        """Tells whether it is a finite number of the kind; `True` is none."""
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

    def complaint(self, value: Any) -> str:
        """The message about a value that is not in the range, without the option's name."""
        words = self._in_words()
        if not self._is_number(value):
            noun = "an integer" if self.kind is int else "a number"
            words = f"{noun} of {words}" if words.startswith("at least") else f"{noun} {words}"
        said = self.says if self._is_number(value) else "must be {range}"
        got = value if isinstance(value, (int, float)) else repr(value)
        got = str(got) if len(str(got)) <= MAX_QUOTED else f"{str(got)[:MAX_QUOTED]}..."
        return f"{said.format(range=words)}, got {got}{f': {self.note}' if self.note else ''}."

    def __call__(self, text: str) -> Any:
        """Reads a number of the command line.

        Raises:
            argparse.ArgumentTypeError: it is no number of the kind, or out of range.
        """
        try:
            value = self.kind(text)
        except ValueError:  # also of more digits than Python reads
            raise argparse.ArgumentTypeError(self.complaint(text)) from None
        if value not in self:
            raise argparse.ArgumentTypeError(self.complaint(value))
        return value


def integer(low: int = 0, high: int | None = MAX_COUNT, **words: Any) -> Range:
    """The integers between two bounds, both included."""
    return Range(int, low, high, **words)


def number(low: float = 0, high: float | None = None, **options: Any) -> Range:
    """The numbers between two bounds; the options are those of [`Range`]."""
    return Range(float, low, high, **options)


# What many options are.
POSITIVE = integer(1)
SEED = integer(0, 2**32 - 2**16, note="NumPy takes no other, and each process adds its rank")
FRACTION = number(0, 1, open_high=True)
