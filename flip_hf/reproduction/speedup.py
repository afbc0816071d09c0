"""How much sooner a masked run is as good as the unmasked one: the paper's headline."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flip_hf.reproduction.plan import LENGTHS
from flip_hf.reproduction.running import Point

BASELINE = "mask0-full"


@dataclass(frozen=True)
class SpeedUp:
    """Of one recipe and one seed.

    Attributes:
        recipe: `mask50`, `mask75`, with `-tuned` where it was tuned on whole images.
        seed: its seed.
        factor: time of the baseline over that of the recipe at the baseline's accuracy; a bound where it is not inside.
        bound: `""`, or `">"`: the shortest run is as good already, or `"<"`: the longest is not as good yet.
    """

    recipe: str
    seed: int
    factor: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound}{self.factor:.2f}x"


def curve(points: Sequence[Point], recipe: str, seed: int) -> list[tuple[float, float]]:
    """(seconds, accuracy) of a recipe's runs, by length; the time of a run that it started from is its own, too."""
    by_name = {point.name: point for point in points if point.seed == seed}
    mask, _, tuned = recipe.partition("-")
    names = [f"{mask}-{length}{'-' + tuned if tuned else ''}" for length in LENGTHS]
    found = [by_name[name] for name in names if name in by_name]
    return sorted((total_seconds(point, by_name), point.top1) for point in found)


def total_seconds(point: Point, by_name: dict[str, Point]) -> float:
    """Seconds of training, with those of the run that it started from."""
    return point.seconds + (total_seconds(by_name[point.start], by_name) if point.start in by_name else 0.0)


def speed_up(points: Sequence[Point], recipe: str, seed: int) -> SpeedUp | None:
    """The factor of one seed, read off between the lengths on a logarithmic axis of time; None without its runs."""
    baseline = next((point for point in points if (point.name, point.seed) == (BASELINE, seed)), None)
    along = curve(points, recipe, seed)
    if baseline is None or not along:
        return None
    goal, times, accuracy = baseline.top1, [t for t, _ in along], np.maximum.accumulate([a for _, a in along])
    if accuracy[0] >= goal:
        return SpeedUp(recipe, seed, baseline.seconds / times[0], ">")
    if accuracy[-1] < goal:
        return SpeedUp(recipe, seed, baseline.seconds / times[-1], "<")
    after = int(np.argmax(accuracy >= goal))
    share = (goal - accuracy[after - 1]) / (accuracy[after] - accuracy[after - 1])
    log_time = math.log(times[after - 1]) + share * (math.log(times[after]) - math.log(times[after - 1]))
    return SpeedUp(recipe, seed, baseline.seconds / math.exp(log_time))


def speed_ups(points: Sequence[Point]) -> dict[str, list[SpeedUp]]:
    """Of every masked recipe, over the seeds."""
    seeds = sorted({point.seed for point in points})
    recipes = [f"mask{mask}{tuned}" for mask in (50, 75) for tuned in ("", "-tuned")]
    found = {recipe: [speed_up(points, recipe, seed) for seed in seeds] for recipe in recipes}
    return {recipe: [each for each in many if each is not None] for recipe, many in found.items()}
