"""Counts samples that cannot be used by reason, logs some of them, and stops when they are most of the data."""

import logging
import time
from collections import Counter

logger = logging.getLogger(__name__)

# Refusals that each worker logs one by one; after these it logs one a minute. All are counted.
MAX_LOGGED = 10
LOG_SECONDS = 60
# The fraction of bad samples is checked each time a worker has seen this many samples.
WINDOW = 2048


class RefusedSample(Exception):
    """A sample cannot be used; `reason` is a short, countable phrase."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class BadDataError(RuntimeError):
    """The data are mostly unusable, or a reader finds nothing in them; training on them would be a mistake."""


class Refusals:
    """One worker's counts of used and refused samples.

    Args:
        max_bad_fraction: a larger fraction of refused samples among `WINDOW` ends the run.
        window: used and refused samples since the last check, when resuming.
    """

    def __init__(self, max_bad_fraction: float = 1.0, window: tuple[int, int] = (0, 0)):
        self.max_bad_fraction = max_bad_fraction
        self.good, self.bad = window
        self._drawn: Counter[str] = Counter()
        self._refused: dict[str, Counter[str]] = {}
        self._held_out: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()  # of this window, for the message
        self._logged = 0
        self._last_log = 0.0
        self._silent = 0

    def accept(self, source: str) -> None:
        """Counts a used sample of a source."""
        self._drawn[source] += 1
        self.good += 1
        self._look()

    def hold_out(self, source: str) -> None:
        """Counts a held-out sample of a source, neither used nor refused."""
        self._held_out[source] += 1

    def add(self, source: str, reason: str, detail: str) -> None:
        """Counts a sample or shard of a source that cannot be used.

        Args:
            source: the source's name.
            reason: a countable phrase.
            detail: the sample or shard, for the log.

        Raises:
            BadDataError: it was one too many.
        """
        self._refused.setdefault(source, Counter())[reason] += 1
        self._reasons[f"{reason} in {source}"] += 1
        self._log(source, reason, detail)
        self.bad += 1
        self._look()

    def _log(self, source: str, reason: str, detail: str) -> None:
        now = time.monotonic()
        if self._logged >= MAX_LOGGED and now - self._last_log < LOG_SECONDS:
            self._silent += 1
            return
        self._logged = self._logged + 1
        self._last_log = now
        more = f" ({self._silent} more were not logged)" if self._silent else ""
        more = " (from now on, one a minute is logged)" if self._logged == MAX_LOGGED else more
        self._silent = 0
        logger.warning("Skipped in %s: %s, %s%s", source, reason, detail, more)

    def _look(self) -> None:
        total = self.good + self.bad
        if total < WINDOW:
            return
        if self.bad > self.max_bad_fraction * total:
            raise BadDataError(
                f"Of a worker's last {total:,} samples, {self.bad:,} could not be used, which is more than "
                f"--max_bad_fraction {self.max_bad_fraction:g}: {self.reasons()}. Fix the data, or allow more. The "
                "last checkpoint is kept."
            )
        self.good = self.bad = 0
        self._reasons.clear()

    def reasons(self) -> str:
        """Describes the most common recent reasons."""
        return ", ".join(f"{count:,} x {reason}" for reason, count in self._reasons.most_common(5)) or "nothing refused"

    def take(self) -> dict[str, dict]:
        """Returns the counts since the last call; see [`TrainLoader.counts`]."""
        counts = {
            "drawn": dict(self._drawn),
            "refused": {name: dict(c) for name, c in self._refused.items()},
            "held_out": dict(self._held_out),
        }
        self._drawn = Counter()
        self._refused = {}
        self._held_out = Counter()
        return counts


def add_counts(total: dict[str, dict], counts: dict[str, dict]) -> None:
    """Adds a result of [`Refusals.take`] to a total of the same form."""
    for kind in ("drawn", "held_out"):
        for name, count in counts.get(kind, {}).items():
            total[kind][name] = total[kind].get(name, 0) + count
    for name, reasons in counts["refused"].items():
        known = total["refused"].setdefault(name, {})
        for reason, count in reasons.items():
            known[reason] = known.get(reason, 0) + count
