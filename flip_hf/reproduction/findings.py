"""What the points say about each finding of the paper: agrees, disagrees, or within noise.

A finding is a difference of accuracies. That one is better is said where Welch's t-test over the seeds tells the two
means apart (p < 0.05), and that they are about the same where the difference's 90 % interval lies within two points
(two one-sided tests). All else is within noise: few seeds tell only large differences apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

from flip_hf.reproduction.plan import MAIN
from flip_hf.reproduction.running import Point

SIGNIFICANT = 0.05
LEVEL = 2.0  # points of accuracy; those closer are about the same
AGREES, DISAGREES, NOISE, MISSING = "agrees", "disagrees", "within noise", "not run"


@dataclass(frozen=True)
class Claim:
    """`first` less `second`, and what the paper has for it.

    Attributes:
        table: of the paper (or of a later one) that has it.
        text: what is claimed, in words.
        first, second: names of runs, or `NAME:WAY` of an inference's way.
        paper: the paper's difference, in points of accuracy.
        expected: the sign of what is claimed: 1, -1; 0 where it is that they are about the same.
    """

    table: str
    text: str
    first: str
    second: str
    paper: float
    expected: int


@dataclass(frozen=True)
class Finding:
    """A claim against the points; accuracies in percent, of each seed."""

    claim: Claim
    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def difference(self) -> float:
        return float(np.mean(self.first) - np.mean(self.second))

    @property
    def p_value(self) -> float:
        """That the means are the same, by Welch's test; 1 where there are too few seeds to know."""
        return float(self._test.pvalue) if self._has_spread else 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """The difference's, 90 %, in points; everything where there are too few seeds to know."""
        if not self._has_spread:
            return -math.inf, math.inf
        low, high = self._test.confidence_interval(1 - 2 * SIGNIFICANT)
        return float(low), float(high)

    @property
    def _has_spread(self) -> bool:
        return min(len(self.first), len(self.second)) > 1 and len({*self.first}) + len({*self.second}) > 2

    @property
    def _test(self) -> Any:
        return ttest_ind(self.first, self.second, equal_var=False)

    @property
    def verdict(self) -> str:
        if not self.first or not self.second:
            return MISSING
        low, high = self.interval
        if not self.claim.expected and -LEVEL < low and high < LEVEL:
            return AGREES
        if self.p_value >= SIGNIFICANT:
            return NOISE
        return AGREES if np.sign(self.difference) == self.claim.expected else DISAGREES


def _way(name: str, kind: str) -> str:
    return f"{name}-inference:{kind}"


def _claims() -> list[Claim]:
    m0, m50, m75 = (f"mask{mask}-{MAIN}" for mask in (0, 50, 75))
    less, more = "-batch0.5x", "-batch2x"
    return [
        Claim("1a", "half of the patches, at twice the batch, beat whole images", f"{m50}{more}", m0, 1.0, 1),
        Claim("1a", "a quarter, at four times the batch, comes close", f"{m75}{more}", f"{m0}{less}", -0.4, 0),
        Claim("1a", "at the same batch, half of the patches do as well", m50, m0, -0.1, 0),
        Claim("1a", "at the same batch, a quarter does worse", m75, m0, -2.8, -1),
        Claim("1b", "four times the batch is better, half of the patches", f"{m50}{more}", f"{m50}{less}", 1.9, 1),
        Claim("1b", "four times the batch is better, a quarter of them", f"{m75}{more}", f"{m75}{less}", 2.4, 1),
        Claim("1c", "masking texts at random harms", f"{m75}-text-random", m75, -2.2, -1),
        Claim("1c", "dropping padding first harms little", f"{m75}-text-prioritized", m75, -0.4, 0),
        *(
            claim
            for name, kept, (one, views) in ((m50, "half", (3.2, 1.5)), (m75, "a quarter", (7.3, 3.1)))
            for claim in (
                Claim("1d", f"{kept}: whole images beat one view", _way(name, "whole"), _way(name, "one view"), one, 1),
                Claim("1d", f"{kept}: and the mean of views", _way(name, "whole"), _way(name, "ensemble"), views, 1),
            )
        ),
        Claim("1e", "tuning on whole images helps, half of the patches", f"{m50}-tuned", m50, 0.5, 1),
        Claim("1e", "tuning on whole images helps, a quarter of them", f"{m75}-tuned", m75, 1.3, 1),
        Claim("1f", "reconstruction changes little, half of the patches", f"{m50}-reconstruction", m50, -0.2, 0),
        Claim("1f", "reconstruction changes little, a quarter of them", f"{m75}-reconstruction", m75, -0.3, 0),
        Claim("CLIPA", "a smaller image beats random patches", f"{m75}-resize", m75, 1.3, 1),
        Claim("CLIPA", "a block beats random patches", f"{m75}-block", m75, 0.9, 1),
        Claim("CLIPA", "a grid does not", f"{m75}-grid", m75, -0.3, -1),
        Claim("GLIP", "patches near the centre beat random ones", f"{m75}-gaussian", m75, 1.9, 1),
    ]


CLAIMS = _claims()


def accuracies(points: Sequence[Point]) -> dict[str, dict[int, float]]:
    """Accuracy in percent by run and seed; ways of an inference are runs named `NAME:WAY`."""
    found: dict[str, dict[int, float]] = {}
    for point in points:
        found.setdefault(point.name, {})[point.seed] = 100 * point.top1
        for kind, value in point.inference.items():
            found.setdefault(f"{point.name}:{kind}", {})[point.seed] = 100 * value
    return found


def findings(points: Sequence[Point]) -> list[Finding]:
    """Every claim with the accuracies that there are."""
    by_name = accuracies(points)
    return [Finding(claim, _seeds(by_name, claim.first), _seeds(by_name, claim.second)) for claim in CLAIMS]


def _seeds(by_name: Mapping[str, Mapping[int, float]], name: str) -> tuple[float, ...]:
    return tuple(value for _, value in sorted(by_name.get(name, {}).items()))
