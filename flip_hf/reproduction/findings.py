"""The paper's findings against the points: agrees, disagrees, or within noise.

A finding is a difference of accuracies. One is better if a t-test over the seeds separates the two means (p < 0.05).
They are about the same if the difference's 90 % interval lies within two points (two one-sided tests), and not the same
if it lies outside. All else is within noise: few seeds separate only large differences. The test is Welch's, or the
paired one where one model is the other in another use, or derived from it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import ttest_ind, ttest_rel

from flip_hf.reproduction.plan import MAIN, MASKS, PAIRS, SETS, STAGES, Scale, planned_runs
from flip_hf.reproduction.running import Point

SIGNIFICANT = 0.05
LEVEL = 2.0  # points of accuracy; closer ones are about the same
AGREES = "agrees"
DISAGREES = "disagrees"
NOISE = "within noise"
MISSING = "not run"


@dataclass(frozen=True)
class Claim:
    """A claim about `first` minus `second`, with the paper's value.

    Attributes:
        table: its table in the paper, or the later paper's name.
        text: the claim in words.
        first, second: names of runs, or `NAME:WAY` for one way of inference.
        paper: the paper's difference, in points of accuracy.
        expected: the sign of the claimed difference: 1, -1; 0 for about the same.
        paired: compare seed by seed, since the models are the same or one is derived from the other.
    """

    table: str
    text: str
    first: str
    second: str
    paper: float
    expected: int
    paired: bool = False


@dataclass(frozen=True)
class Finding:
    """A claim with the accuracies of both sides, in percent, for each seed."""

    claim: Claim
    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def difference(self) -> float:
        return float(np.mean(self.first) - np.mean(self.second))

    @property
    def p_value(self) -> float:
        """The p-value of equal means; 1 where there are too few seeds."""
        if self.standard_error is None or not self.difference:
            return 1.0
        return float(self._test.pvalue) if self.standard_error else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The difference's 90 % confidence interval, in points; infinite where there are too few seeds."""
        if self.standard_error is None:
            return -math.inf, math.inf
        if not self.standard_error:
            return self.difference, self.difference
        low, high = self._test.confidence_interval(1 - 2 * SIGNIFICANT)
        return float(low), float(high)

    @property
    def standard_error(self) -> float | None:
        """The difference's standard error, in points; None where there are too few seeds."""
        if min(len(self.first), len(self.second)) < 2:
            return None
        if self._is_paired:
            return float(np.std(np.subtract(self.first, self.second), ddof=1) / math.sqrt(len(self.first)))
        return math.sqrt(sum(np.var(values, ddof=1) / len(values) for values in (self.first, self.second)))

    @property
    def _is_paired(self) -> bool:
        return self.claim.paired and len(self.first) == len(self.second)

    @property
    def _test(self) -> Any:
        return (
            ttest_rel(self.first, self.second)
            if self._is_paired
            else ttest_ind(self.first, self.second, equal_var=False)
        )

    @property
    def verdict(self) -> str:
        if not self.first or not self.second:
            return MISSING
        low, high = self.interval
        if not self.claim.expected:
            inside = -LEVEL < low and high < LEVEL
            outside = high < -LEVEL or low > LEVEL
            return AGREES if inside else DISAGREES if outside else NOISE
        if self.p_value >= SIGNIFICANT:
            return NOISE
        return AGREES if np.sign(self.difference) == self.claim.expected else DISAGREES


def _claims() -> list[Claim]:
    m0, m50, m75 = (f"mask{mask}-{MAIN}" for mask in MASKS)
    long0, long50, long75 = (f"mask{mask}-full" for mask in MASKS)
    less = "-batch0.5x"
    more = "-batch2x"
    return [
        Claim("1a", "half of the patches, at twice the batch, beat whole images", f"{m50}{more}", m0, 1.0, 1),
        Claim("1a", "a quarter, at four times the batch, comes close", f"{m75}{more}", f"{m0}{less}", -0.4, 0),
        Claim("1a", "at the same batch, half of the patches do as well", m50, m0, -0.1, 0),
        Claim("1a", "at the same batch, a quarter does worse", m75, m0, -2.8, -1),
        Claim("1a", "and after twice as many pairs, half of the patches", long50, long0, -0.1, 0),
        Claim("1a", "and after twice as many pairs, a quarter", long75, long0, -2.8, -1),
        Claim("1b", "four times the batch is better, half of the patches", f"{m50}{more}", f"{m50}{less}", 1.9, 1),
        Claim("1b", "four times the batch is better, a quarter of them", f"{m75}{more}", f"{m75}{less}", 2.4, 1),
        Claim("1c", "masking texts at random harms", f"{m75}-text-random", m75, -2.2, -1),
        # Paired: captions of the embedded data fit into the kept tokens, so that the models are the same.
        Claim("1c", "dropping padding first harms little", f"{m75}-text-prioritized", m75, -0.4, 0, True),
        *(
            claim
            for mask, kept, (one, views) in ((m50, "half", (3.2, 1.5)), (m75, "a quarter", (7.3, 3.1)))
            for name in (f"{mask}-inference",)
            for claim in (
                Claim("1d", f"{kept}: whole images beat one view", f"{name}:whole", f"{name}:one view", one, 1, True),
                Claim("1d", f"{kept}: and the mean of views", f"{name}:whole", f"{name}:ensemble", views, 1, True),
            )
        ),
        Claim("1e", "tuning on whole images helps, half of the patches", f"{m50}-tuned", m50, 0.5, 1, True),
        Claim("1e", "tuning on whole images helps, a quarter of them", f"{m75}-tuned", m75, 1.3, 1, True),
        Claim("1e", "and after twice as many pairs, half of the patches", f"{long50}-tuned", long50, 0.5, 1, True),
        Claim("1e", "and after twice as many pairs, a quarter", f"{long75}-tuned", long75, 1.3, 1, True),
        Claim("1f", "reconstruction changes little, half of the patches", f"{m50}-reconstruction", m50, -0.2, 0),
        Claim("1f", "reconstruction changes little, a quarter of them", f"{m75}-reconstruction", m75, -0.3, 0),
        Claim("CLIPA", "a smaller image beats random patches", f"{m75}-resize", m75, 1.3, 1),
        Claim("CLIPA", "a block beats random patches", f"{m75}-block", m75, 0.9, 1),
        Claim("CLIPA", "a grid makes no difference", f"{m75}-grid", m75, -0.3, 0),
        Claim("CLIPA", "nor after twice as many pairs", f"{long75}-grid", long75, -0.3, 0),
        *(
            # The paper's value is its mean gain over a cross-entropy, on other data.
            Claim("UniCL", f"equal captions as positives help, {mask} % masked", name, f"{name}-{PAIRS}", 9.2, 1)
            for mask, name in zip(MASKS, (m0, m50, m75), strict=True)
        ),
        Claim("GLIP", "patches near the centre beat random ones", f"{m75}-gaussian", m75, 1.9, 1),
        # The paper's value is that of its whole method over random patches, at half of them, a mean over 17 data sets.
        Claim("CLIP-PGS", "patches with edges beat random ones", f"{m75}-edges", m75, 4.6, 1),
        Claim("PE", "small images first lose nothing", f"{long0}-{STAGES}", long0, 0.0, 0),
    ]


CLAIMS = _claims()


def accuracies(points: Sequence[Point]) -> dict[str, dict[int, float]]:
    """Collects accuracies in percent by run and seed; ways of inference are runs named `NAME:WAY`."""
    found: dict[str, dict[int, float]] = {}
    for point in points:
        found.setdefault(point.name, {})[point.seed] = 100 * point.top1
        for kind, value in point.inference.items():
            found.setdefault(f"{point.name}:{kind}", {})[point.seed] = 100 * value
    return found


def claims_of(which: str) -> list[Claim]:
    """Lists the claims about runs of one of `SETS`."""
    scale = Scale(samples=64, batch=4, base_lr=1.0, decoder={}, image_size=16, patch_size=4)
    planned = {run.name for run in planned_runs(scale, which)}
    return [claim for claim in CLAIMS if {_run(claim.first), _run(claim.second)} <= planned]


def _run(name: str) -> str:
    return name.partition(":")[0]


def findings(points: Sequence[Point], which: str = SETS[0]) -> list[Finding]:
    """Joins every claim of a set with its accuracies, by seed; only seeds that both sides have where it is paired."""
    by_name = accuracies(points)
    found = []
    for claim in claims_of(which):
        first = by_name.get(claim.first, {})
        second = by_name.get(claim.second, {})
        if claim.paired:
            both = first.keys() & second.keys()
            first, second = ({seed: side[seed] for seed in both} for side in (first, second))
        found.append(Finding(claim, *(tuple(side[seed] for seed in sorted(side)) for side in (first, second))))
    return found
