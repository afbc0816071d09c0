"""The speed-up of masked runs to the accuracy of the unmasked one: the paper's headline."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flip_hf.reproduction.plan import BEST_STRATEGY, LENGTHS
from flip_hf.reproduction.running import Point

CURVES = ("mask0", "mask50", "mask75", f"mask75-{BEST_STRATEGY}")  # recipes that are run at every length
BASELINES = ("mask0-half", "mask0-full")  # runs whose accuracy is the target: halfway, and at the end


@dataclass(frozen=True)
class SpeedUp:
    """The speed-up of one recipe and one seed.

    Attributes:
        factor: time of the baseline over that of the recipe at the baseline's accuracy, or a bound of it.
        bound: `""`, or `">"`: the shortest run is already as good, or `"<"`: the longest is not yet as good.
    """

    factor: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound}{self.factor:.2f}x"


def _step(point: Point) -> str:
    """Returns its name without its length: such points have the same steps, and tuning has the unmasked ones'."""
    mask, _, *rest = point.name.split("-")
    return "mask0" if rest[-1:] == ["tuned"] else "-".join((mask, *rest))


def steady(points: Sequence[Point]) -> list[Point]:
    """Replaces times and waits for data by the median of all points that have the same steps.

    The speed of a shared machine drifts over the hours that the runs take, by more than the differences to measure.
    """
    alike: dict[str, list[Point]] = {}
    for point in points:
        if point.samples and not point.name.endswith("-tuned"):  # too short to be measured
            alike.setdefault(_step(point), []).append(point)
    speeds = {step: float(np.median([each.samples / each.seconds for each in many])) for step, many in alike.items()}
    waits = {step: float(np.median([each.data_wait for each in many])) for step, many in alike.items()}
    return [
        replace(point, seconds=point.samples / speeds[_step(point)], data_wait=waits[_step(point)])
        if _step(point) in alike
        else point
        for point in points
    ]


def with_waits(points: Sequence[Point]) -> list[Point]:
    """Adds the waits for data to the points' times."""
    return [replace(point, seconds=point.seconds / (1 - point.data_wait), data_wait=0.0) for point in points]


def curve(points: Sequence[Point], recipe: str, seed: int) -> list[tuple[float, float]]:
    """Returns (seconds, accuracy) of a recipe's runs, by length, including the time of runs they started from."""
    by_name = {point.name: point for point in points if point.seed == seed}
    lines = [lineage(by_name[name], by_name) for name in names_of(recipe) if name in by_name]
    return sorted((sum(each.seconds for each in line), line[0].top1) for line in lines if line)


def names_of(recipe: str) -> list[str]:
    """Lists the names of a recipe's runs: `mask75-grid` has `mask75-quarter-grid` and so on."""
    mask, *rest = recipe.split("-")
    return ["-".join((mask, length, *rest)) for length in LENGTHS]


def lineage(point: Point, by_name: dict[str, Point]) -> list[Point]:
    """Returns the point and those it started from, whose time and samples count; empty if one is missing."""
    if point.start is None:
        return [point]
    before = lineage(by_name[point.start], by_name) if point.start in by_name else []
    return [point, *before] if before else []


def speed_up(points: Sequence[Point], recipe: str, seed: int, to: str = BASELINES[-1]) -> SpeedUp | None:
    """Computes the speed-up of one seed, interpolated between lengths on a log axis of time.

    None without its runs, and where all of them are longer than the unmasked one and as good.

    Args:
        points: the points of all runs.
        recipe: one of `CURVES`, with `-tuned` if it was tuned on whole images.
        seed: seed of the recipe and of the baseline.
        to: name of the unmasked run whose accuracy is the target.
    """
    baseline = next((point for point in points if (point.name, point.seed) == (to, seed)), None)
    along = curve(points, recipe, seed)
    if baseline is None or not along:
        return None
    goal = baseline.top1
    times = [t for t, _ in along]
    accuracy = np.maximum.accumulate([a for _, a in along])
    if accuracy[0] >= goal:
        factor = baseline.seconds / times[0]
        return SpeedUp(factor, ">") if factor > 1 else None  # a longer run that is as good says nothing
    if accuracy[-1] < goal:
        return SpeedUp(baseline.seconds / times[-1], "<")
    after = int(np.argmax(accuracy >= goal))
    share = (goal - accuracy[after - 1]) / (accuracy[after] - accuracy[after - 1])
    log_time = math.log(times[after - 1]) + share * (math.log(times[after]) - math.log(times[after - 1]))
    return SpeedUp(baseline.seconds / math.exp(log_time))


def speed_ups(points: Sequence[Point], to: str = BASELINES[-1]) -> dict[str, list[SpeedUp]]:
    """Computes the speed-ups of every masked recipe that has runs, for all seeds."""
    seeds = sorted({point.seed for point in points})
    recipes = [f"{recipe}{tuned}" for recipe in CURVES[1:] for tuned in ("", "-tuned")]
    found = {recipe: [speed_up(points, recipe, seed, to) for seed in seeds] for recipe in recipes}
    return {recipe: [each for each in many if each is not None] for recipe, many in found.items() if any(many)}


def summary(many: Sequence[SpeedUp]) -> tuple[float, str]:
    """Returns the geometric mean over seeds, and `">"`, `"<"` or `"~"` where seeds are bounds of one kind or both."""
    bounds = {each.bound for each in many} - {""}
    factor = math.exp(float(np.mean([math.log(each.factor) for each in many])))
    return factor, "~" if len(bounds) > 1 else "".join(bounds)


def best_recipe(points: Sequence[Point]) -> str | None:
    """Returns the masked recipe that is first as good as the unmasked one's end, for every seed; None if none is."""
    seeds = len({point.seed for point in points if point.name == BASELINES[-1]})
    found = {recipe: summary(many) for recipe, many in speed_ups(points).items() if len(many) == seeds}
    reached = [recipe for recipe, (factor, bound) in found.items() if bound in ("", ">") and factor > 1]
    return max(reached, key=lambda recipe: found[recipe][0], default=None)
